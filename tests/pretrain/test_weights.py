"""Foreign weights: features equal to open_clip's, a way back its class loads, refusals that name tensors."""

from __future__ import annotations

import logging
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.models.request import FeatureRequest
from pretrain.models.trunk import Trunk, build_trunk
from pretrain.recipe import ModelRecipe
from pretrain.weights.files import read_weights
from pretrain.weights.naming import differences
from pretrain.weights.open_clip import load_open_clip, model_recipe, to_open_clip
from pretrain.weights.timm import load_timm, to_timm

IMAGE, CAPTION = FeatureRequest("image", "crop"), FeatureRequest("text", "caption")
PIXELS = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CAPTIONS = ["a dog", "two people in red coats watch a brown dog run over the wet grass"]
TEXT_LAYERS, VISION_LAYERS = 4, 4


def theirs(name: str) -> nn.Module:
    """open_clip's class with random weights, every bias and norm moved off its initial 0 or 1.

    Towers are cut to a few blocks to save time; the ResNet is whole. All widths are the real ones.
    """
    logging.disable(logging.WARNING)  # "initialized randomly" is what is wanted
    base = open_clip.get_model_config(name)
    vision = base["vision_cfg"] | ({} if name.startswith("RN") else {"layers": VISION_LAYERS})
    model = open_clip.create_model(
        name, pretrained=None, vision_cfg=vision, text_cfg=base["text_cfg"] | {"layers": TEXT_LAYERS}
    )
    logging.disable(logging.NOTSET)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def ours(name: str) -> ModelRecipe:
    recipe = model_recipe(name)
    kwargs = {} if name.startswith("RN") else {"depth": VISION_LAYERS}
    text = recipe.text.model_copy(update={"layers": TEXT_LAYERS})
    return recipe.model_copy(update={"image_kwargs": kwargs, "text": text})


def features(model: nn.Module, recipe: ModelRecipe) -> tuple[Tensor, Tensor]:
    """(image, text) features, not normalised, of our trunk or of open_clip's model."""
    ids = open_clip.get_tokenizer("ViT-B-32")(CAPTIONS)
    with torch.no_grad():
        if isinstance(model, Trunk):
            return tuple(model({IMAGE: PIXELS, CAPTION: ids}).values())
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.mean, recipe.std))
        return model.encode_image((PIXELS.float() / 255 - mean) / std), model.encode_text(ids)


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32", "ViT-B-16", "ViT-B-32-quickgelu"])
def test_features_equal_open_clips_there_and_back(name: str) -> None:
    peer, recipe = theirs(name), ours(name)
    trunk = build_trunk(recipe, seed=0).eval()
    expected = features(peer, recipe)
    scale = load_open_clip(trunk, peer.state_dict())
    assert scale.shape == (1,)
    assert scale.item() == pytest.approx(peer.logit_scale.item())
    for found, want in zip(features(trunk, recipe), expected):
        assert (found - want).abs().max() < 1e-5 * want.abs().max()

    original = {n: t.clone() for n, t in peer.state_dict().items()}
    with torch.no_grad():
        for tensor in peer.state_dict().values():
            tensor.zero_()
    peer.load_state_dict(to_open_clip(trunk, scale), strict=True)
    assert all(torch.equal(t, original[n]) for n, t in peer.state_dict().items())


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Trunk]:
    recipe = ours("ViT-B-32")
    return theirs("ViT-B-32"), build_trunk(recipe, seed=0).eval()


def test_weights_that_do_not_fit_are_listed_and_nothing_is_copied(small: tuple[nn.Module, Trunk]) -> None:
    peer, trunk = small
    before = {n: t.clone() for n, t in trunk.state_dict().items()}
    state = peer.state_dict()
    state["positional_embedding"] = state["positional_embedding"][:64]
    state["visual.extra"] = torch.zeros(3)
    del state["ln_final.bias"]
    with pytest.raises(UserError) as error:
        load_open_clip(trunk, state)
    message = str(error.value)
    assert "positional_embedding  77x512  64x512" in message
    assert "ln_final.bias         512     -" in message
    assert "visual.extra          -       3" in message
    assert all(torch.equal(t, before[n]) for n, t in trunk.state_dict().items())


def test_weights_of_another_tower_are_refused(small: tuple[nn.Module, Trunk]) -> None:
    model = ModelRecipe(image="vit_tiny_patch16_224", image_kwargs={"depth": 1}, embed_dim=512)
    with pytest.raises(UserError, match=r"visual\.trunk\.cls_token +1x1x192 +-"):
        load_open_clip(build_trunk(model, seed=0), small[0].state_dict())
    image_only = build_trunk(model.model_copy(update={"text": None}), seed=0)
    with pytest.raises(UserError, match="text tower"):
        to_open_clip(image_only)
    with pytest.raises(UserError, match=r"near: .*ViT-L-14"):
        model_recipe("ViT-L-13")
    with pytest.raises(UserError, match="hf_model_name"):
        model_recipe("roberta-ViT-B-32")


def test_files_are_read_with_what_trainers_wrap_around_them(small: tuple[nn.Module, Trunk], tmp_path: Path) -> None:
    peer, trunk = small
    state = peer.state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": t for n, t in state.items()}}, tmp_path / "epoch_3.pt")
    save_file(state, tmp_path / "model.safetensors")
    for file in ("epoch_3.pt", "model.safetensors"):
        assert load_open_clip(trunk, tmp_path / file).item() == pytest.approx(peer.logit_scale.item())
    custom = {f"text.{n}" if not n.startswith(("visual", "logit")) else n: t for n, t in state.items()}
    load_open_clip(trunk, custom)


def test_unreadable_files_are_refused_by_name(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return print, ("run",)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    (tmp_path / "text.pth").write_text("hello")
    for file in ("evil.pt", "list.pt", "cut.safetensors", "text.pth", "none.pt"):
        with pytest.raises(UserError, match=file):
            read_weights(tmp_path / file)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_timm_weights_there_and_back(name: str) -> None:
    kwargs = {"depth": 2} if name.startswith("vit") else {}
    torch.manual_seed(0)
    peer = timm.create_model(name, num_classes=10, **kwargs).eval()
    recipe = ModelRecipe(image=name, image_kwargs=kwargs, text=None, embed_dim=16)
    trunk = build_trunk(recipe, seed=1).eval()
    load_timm(trunk, peer.state_dict())
    peer.to(memory_format=trunk.image._layout)  # the same kernels, so that bits can be compared
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = peer.forward_head(peer.forward_features(x), pre_logits=True)
        assert torch.equal(trunk.image.backbone(x), want)
    timm.create_model(name, num_classes=0, **kwargs).load_state_dict(to_timm(trunk), strict=True)
    with pytest.raises(UserError, match="tensor"):
        load_timm(trunk, {n: t for n, t in peer.state_dict().items() if "norm" not in n and "bn" not in n})


def test_the_table_of_differences_is_cut() -> None:
    shown = differences({f"layer.{i}": (2, 3) for i in range(20)}, {})
    assert shown.count("\n") == 13
    assert "and 8 more" in shown
    assert differences({"a": (1,)}, {"a": (1,)}) == ""
