"""Hugging Face's CLIP and SigLIP: their classes' folders in with equal features, and back out bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from pretrain.errors import UserError
from pretrain.models.request import FeatureRequest
from pretrain.models.trunk import Trunk, build_trunk
from pretrain.objectives import build
from pretrain.objectives.joint import Joint
from pretrain.recipe import InitRecipe, ModelRecipe, TextRecipe
from pretrain.weights.hf import load_hf, to_hf
from pretrain.weights.init import load_init
from tests.tiny import FACTS

IMAGE, CAPTION = FeatureRequest("image", "crop"), FeatureRequest("text", "caption")
END = 49407
PIXELS = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
HALF = (0.5, 0.5, 0.5)
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
CLIP = ModelRecipe(
    image="vit_base_patch32_clip_224", image_size=64, image_kwargs=VIT, embed_dim=24, activation="quick_gelu",
    text=TextRecipe(width=48, layers=2, heads=2, context=16),
)  # fmt: skip
SIGLIP = ModelRecipe(
    image="vit_base_patch16_siglip_224", image_size=64, image_kwargs=VIT | {"act_layer": "gelu_tanh"}, embed_dim=None,
    mean=HALF, std=HALF,
    text=TextRecipe(
        width=48, layers=2, heads=2, context=16, vocab=100, causal=False, pool="last", projection_bias=True,
        activation="gelu_tanh", norm_eps=1e-6,
    ),
)  # fmt: skip
RECIPES = {"clip": CLIP, "siglip": SIGLIP}


def theirs(kind: str, text_positions: int = 16, image_size: int = 64) -> nn.Module:
    """transformers' class, small, every tensor moved off where it starts."""
    size = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {"max_position_embeddings": text_positions}
    vision = {**size, "hidden_size": 32, "intermediate_size": 64, "image_size": image_size}
    torch.manual_seed(1)
    if kind == "clip":
        text |= {"vocab_size": END + 1, "eos_token_id": END, "bos_token_id": END - 1}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 32}, projection_dim=24))
    else:
        text |= {"vocab_size": 100, "projection_size": 32, "eos_token_id": 1, "bos_token_id": 1}
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision | {"patch_size": 16}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model.eval()


def captions(kind: str) -> Tensor:
    ids = torch.randint(2, 99, (3, 16), generator=torch.Generator().manual_seed(2))
    for row, length in zip(ids, (4, 16, 9)):
        row[length - 1], row[length:] = (END, 0) if kind == "clip" else (1, 1)
    return ids


@torch.no_grad()
def features(model: nn.Module, kind: str) -> list[Tensor]:
    """[image, text], not of unit length, of our trunk or of their model."""
    if isinstance(model, Trunk):
        return list(model({IMAGE: PIXELS, CAPTION: captions(kind)}).values())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (RECIPES[kind].mean, RECIPES[kind].std))
    image = model.get_image_features(pixel_values=(PIXELS.float() / 255 - mean) / std)
    return [image.pooler_output, model.get_text_features(input_ids=captions(kind)).pooler_output]


def assert_near(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, peer in zip(found, wanted):
        assert (ours - peer).abs().max() < 1e-5 * peer.abs().max()


@pytest.mark.parametrize("kind", RECIPES)
def test_a_saved_folder_gives_their_features_and_temperature(kind: str, tmp_path: Path) -> None:
    peer = theirs(kind)
    peer.save_pretrained(tmp_path)
    trunk, joint = build_trunk(RECIPES[kind], seed=0).eval(), Joint(build({kind: {}}, FACTS))
    report = load_init(trunk, joint, InitRecipe(weights=tmp_path))
    assert_near(features(trunk, kind), features(peer, kind))
    assert (report.missing, report.unused, report.resized, report.warnings) == ([], [], {}, [])
    assert len(report.loaded) == len(trunk.state_dict())
    for name, parameter in joint.by_name[kind].named_parameters():
        assert parameter.item() == pytest.approx(getattr(peer, name).item())
        assert f"{kind}.{name}" in report.temperature


@pytest.mark.parametrize("kind", RECIPES)
def test_what_goes_out_loads_there_strictly_and_comes_back_the_same(kind: str) -> None:
    trunk = build_trunk(RECIPES[kind], seed=3).eval()
    tensors, config = to_hf(trunk, RECIPES[kind], torch.tensor([1.5]), -3.0 if kind == "siglip" else None)
    model = (CLIPModel if kind == "clip" else SiglipModel).config_class(**json.loads(json.dumps(config)))
    peer = (CLIPModel if kind == "clip" else SiglipModel)(model).eval()
    peer.load_state_dict(tensors, strict=True)
    assert_near(features(peer, kind), features(trunk, kind))
    assert peer.logit_scale.item() == 1.5

    again = build_trunk(RECIPES[kind], seed=4)
    temperature = load_hf(again, peer.state_dict())
    assert {n: t.item() for n, t in temperature.items()} == {n: tensors[n].item() for n in temperature}
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in trunk.state_dict().items())


def test_the_vision_model_alone_leaves_the_text_tower_fresh(tmp_path: Path) -> None:
    peer = theirs("clip")
    save_file(
        {f"vision_model.{n}": t for n, t in peer.vision_model.state_dict().items()}, tmp_path / "vision.safetensors"
    )
    trunk = build_trunk(CLIP, seed=0).eval()
    fresh = {n: t.clone() for n, t in trunk.state_dict().items()}
    report = load_init(trunk, Joint(build({"clip": {}}, FACTS)), InitRecipe(weights=tmp_path / "vision.safetensors"))
    changed = {n for n, t in trunk.state_dict().items() if not torch.equal(t, fresh[n])}
    assert changed == set(report.loaded) == {n for n in fresh if n.startswith("image.backbone.")}
    assert set(report.missing) == set(fresh) - changed
    assert report.temperature == []


def test_another_activation_than_the_folder_says_is_warned_of(tmp_path: Path) -> None:
    theirs("clip").save_pretrained(tmp_path)
    plain = CLIP.model_copy(update={"activation": "gelu"})
    report = load_init(build_trunk(plain, seed=0), Joint(build({"clip": {}}, FACTS)), InitRecipe(weights=tmp_path))
    assert len(report.warnings) == 2
    assert "was trained with quick_gelu, the recipe's tower has gelu: set model.activation" in report.warnings[0]


def test_texts_of_another_context_are_cut_or_refused(tmp_path: Path) -> None:
    joint = Joint(build({"clip": {}}, FACTS))
    for kind, theirs_context, why in (("clip", 12, "context to 12"), ("siglip", 20, "reads every place")):
        theirs(kind, theirs_context).save_pretrained(tmp_path / kind)
        with pytest.raises(UserError, match=why):
            load_init(build_trunk(RECIPES[kind], seed=0), joint, InitRecipe(weights=tmp_path / kind))
    peer = theirs("clip", 20)
    peer.save_pretrained(tmp_path / "longer")
    trunk = build_trunk(CLIP, seed=0).eval()
    assert load_init(trunk, joint, InitRecipe(weights=tmp_path / "longer")).resized == {
        "text.positional_embedding": "20 to 16"
    }
    assert_near(features(trunk, "clip"), features(peer, "clip"))


def test_what_transformers_has_no_class_for_is_refused() -> None:
    resnet = CLIP.model_copy(update={"image": "resnet50_clip", "image_kwargs": {}})
    with pytest.raises(UserError, match="neither CLIP's nor SigLIP's ViT"):
        to_hf(build_trunk(resnet, seed=0), resnet, 1.0)
    pyramid = CLIP.model_copy(update={"text": CLIP.text.model_copy(update={"pool": "max"})})
    with pytest.raises(UserError, match=r"model\.text\.pool is max"):
        to_hf(build_trunk(pyramid, seed=0), pyramid, 1.0)
    alone = CLIP.model_copy(update={"text": None})
    with pytest.raises(UserError, match="this trunk has none"):
        to_hf(build_trunk(alone, seed=0), alone, 1.0)
