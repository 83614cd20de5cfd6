"""First weights of a run: each published format by its names, other sizes resampled, what does not fit refused."""

from __future__ import annotations

import argparse
import json
import logging
import pickle
import zipfile
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from torchvision.models import resnet50

from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.models.request import FeatureRequest
from pretrain.models.trunk import Trunk, build_trunk
from pretrain.objectives import build
from pretrain.objectives.joint import Joint
from pretrain.parts import assemble
from pretrain.recipe import InitRecipe, ModelRecipe, TextRecipe, parse_recipe
from pretrain.weights.files import read_weights
from pretrain.weights.init import Report, load_init
from pretrain.weights.native import save_export
from pretrain.weights.open_clip import model_recipe, names, to_open_clip
from tests.runs import losses, train_here, weights
from tests.tiny import FACTS, VIT, recipe_data, write_recipe, write_shards

IMAGE, CAPTION = FeatureRequest("image", "crop"), FeatureRequest("text", "caption")
TEXT = TextRecipe(width=32, layers=2, heads=2)
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def load(trunk: Trunk, weights: Path, objective: str = "clip", **options: str) -> Report:
    return load_init(trunk, Joint(build({objective: {}}, FACTS)), InitRecipe(weights=weights, **options))


def shaken(model: nn.Module) -> nn.Module:
    """Every bias, norm and statistic off where it starts."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.05 * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def pixels(size: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_pooled(trunk: Trunk, peer: nn.Module, recipe: ModelRecipe) -> None:
    """The tower's pooled features are those of the peer, which gives them when called."""
    x, (mean, std) = pixels(recipe.image_size), (torch.tensor(v).view(3, 1, 1) for v in (recipe.mean, recipe.std))
    found = trunk.eval()({FeatureRequest("image", "crop", output="pooled"): x})
    want = peer((x.float() / 255 - mean) / std)
    (ours,) = found.values()
    assert (ours - want).abs().max() < 1e-5 * want.abs().max()


def test_swav_hub_files_are_torchvisions_resnet_beside_a_head(tmp_path: Path) -> None:
    peer = shaken(resnet50())
    named = {f"module.{n}": t for n, t in peer.state_dict().items() if not n.startswith("fc.")}
    named |= {"module.projection_head.0.weight": torch.rand(8, 2048), "module.prototypes.weight": torch.rand(30, 8)}
    torch.save(named, tmp_path / "swav_800ep_pretrain.pth.tar")
    peer.fc = nn.Identity()
    recipe = ModelRecipe(image="resnet50", image_size=64, text=TEXT, embed_dim=16)
    trunk = build_trunk(recipe, seed=0)
    report = load(trunk, tmp_path / "swav_800ep_pretrain.pth.tar")
    assert_pooled(trunk, peer, recipe)
    assert report.unused == ["projection_head.0.weight", "prototypes.weight"]
    assert all(n.startswith(("text.", "image.projection.")) for n in report.missing)
    assert "of no use here        projection_head.0.weight, prototypes.weight" in str(report)


def dino(tmp_path: Path, recipe: ModelRecipe) -> tuple[nn.Module, nn.Module, Path]:
    """(student's backbone, teacher's, file of a whole checkpoint): what main_dino.py saves."""
    student, teacher = (shaken(timm.create_model(recipe.image, num_classes=0, **SMALL)) for _ in range(2))
    with torch.no_grad():
        teacher.norm.bias += 1
    head = {"head.mlp.0.weight": torch.rand(8, 48), "head.last_layer.weight_g": torch.ones(30, 1)}
    branches = [{f"backbone.{n}": t for n, t in m.state_dict().items()} | head for m in (student, teacher)]
    content = {
        "student": {f"module.{n}": t for n, t in branches[0].items()},
        "teacher": branches[1],
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16),
        "dino_loss": {"center": torch.zeros(1, 30)},
    }
    torch.save(content, tmp_path / "checkpoint.pth")
    torch.save(teacher.state_dict(), tmp_path / "dino_deitsmall16_pretrain.pth")
    return student, teacher, tmp_path / "checkpoint.pth"


def test_dino_backbones_and_whole_checkpoints(tmp_path: Path) -> None:
    recipe = ModelRecipe(image="vit_small_patch16_224", image_kwargs=SMALL, text=None, embed_dim=None)
    student, teacher, whole = dino(tmp_path, recipe)
    for file, of, peer in [
        (whole, "model", student),
        (whole, "teacher", teacher),
        (tmp_path / "dino_deitsmall16_pretrain.pth", "model", teacher),
    ]:
        trunk = build_trunk(recipe, seed=1)
        report = load(trunk, file, of=of)
        assert_pooled(trunk, peer, recipe)
        assert report.missing == []
    deeper = recipe.model_copy(update={"image_kwargs": SMALL | {"depth": 3}})
    (warning,) = load(build_trunk(deeper, seed=1), whole).warnings
    assert "in part: 12 tensors of it start afresh" in warning
    with pytest.raises(UserError, match=r"no weights of the ema; init\.of can be model and teacher"):
        load(build_trunk(recipe, seed=1), whole, of="ema")


@pytest.mark.parametrize(
    ("image", "file_name"),
    [
        ("vit_small_patch14_dinov2", "dinov2_vits14_pretrain.pth"),
        ("vit_small_patch14_reg4_dinov2", "dinov2_vits14_reg4_pretrain.pth"),
    ],
)
def test_dinov2s_names_are_read_as_timm_reads_them(image: str, file_name: str, tmp_path: Path) -> None:
    kwargs = {**SMALL, "mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 2.67 * 2}
    recipe = ModelRecipe(image=image, image_size=98, image_kwargs=kwargs, text=None, embed_dim=None)
    peer = timm.create_model(image, img_size=98, num_classes=0, **kwargs)
    theirs = {n: t.clone() for n, t in shaken(peer).state_dict().items()}
    theirs = {n.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): t for n, t in theirs.items()}
    theirs["mask_token"] = torch.rand(1, 48)
    theirs["pos_embed"] = torch.rand(1, 1 + 37 * 37, 48)
    if "reg_token" in theirs:
        theirs["register_tokens"] = theirs.pop("reg_token")
    chunked = {
        n.replace("blocks.1.", "blocks.0.1.").replace("blocks.0.n", "blocks.0.0.n"): t for n, t in theirs.items()
    }
    torch.save(theirs, tmp_path / file_name)
    torch.save({"teacher": {f"backbone.{n}": t for n, t in chunked.items()}}, tmp_path / "teacher_checkpoint.pth")
    peer.load_state_dict(checkpoint_filter_fn(dict(theirs), peer), strict=True)

    for file, of in ((file_name, "model"), ("teacher_checkpoint.pth", "teacher")):
        trunk = build_trunk(recipe, seed=0)
        report = load(trunk, tmp_path / file, of=of)
        assert_pooled(trunk, peer, recipe)
        assert list(report.resized) == ["image.backbone.pos_embed"]
        assert (report.missing, report.unused) == ([], ["mask_token"])


def test_openais_torchscript_archives_are_read_without_being_run(tmp_path: Path) -> None:
    logging.disable(logging.WARNING)
    base = open_clip.get_model_config("ViT-B-32-quickgelu")
    cut = {"vision_cfg": base["vision_cfg"] | {"layers": 1}, "text_cfg": base["text_cfg"] | {"layers": 1}}
    peer = shaken(open_clip.create_model("ViT-B-32-quickgelu", pretrained=None, **cut))
    logging.disable(logging.NOTSET)
    image, text = torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.int64)
    inputs = {"forward": (image, text), "encode_image": (image,), "encode_text": (text,)}
    torch.jit.trace_module(peer, inputs, check_trace=False).half().save(str(tmp_path / "ViT-B-32.pt"))
    recipe = model_recipe("ViT-B-32-quickgelu").model_copy(
        update={"image_kwargs": {"depth": 1}, "text": TextRecipe(layers=1)}
    )
    trunk = build_trunk(recipe, seed=0)
    report = load(trunk, tmp_path / "ViT-B-32.pt")
    assert report.missing == []
    assert report.temperature == ["clip.logit_scale"]
    assert report.warnings == []
    plain = build_trunk(recipe.model_copy(update={"activation": "gelu"}), seed=0)
    assert len(load(plain, tmp_path / "ViT-B-32.pt").warnings) == 2
    wanted = to_open_clip(trunk)
    for name, tensor in peer.state_dict().items():
        if name != "logit_scale":
            assert torch.equal(wanted[name], tensor.half().float()), name


def test_code_in_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (tmp_path / "ran").touch, ()

    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/constants.pkl", b"")
        archive.writestr("evil/data.pkl", pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"evil\.pt cannot be read as weights.*has no place among weights"):
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_weights_in_several_files_are_read_as_one(tmp_path: Path) -> None:
    parts = {"a.safetensors": {"x": torch.rand(2)}, "b.safetensors": {"y": torch.rand(3), "z": torch.rand(1)}}
    for file, tensors in parts.items():
        save_file(tensors, tmp_path / file)
    where = {name: file for file, tensors in parts.items() for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    found = read_weights(tmp_path)
    assert {n: t.tolist() for n, t in found.items()} == {n: t.tolist() for p in parts.values() for n, t in p.items()}
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_weights(tmp_path)
    with pytest.raises(UserError, match="no folder of weights"):
        read_weights(tmp_path.parent)


@pytest.mark.parametrize("image", ["vit_base_patch16_clip_224", "resnet50_clip"])
def test_another_image_size_has_its_positions_resampled(image: str, tmp_path: Path) -> None:
    kwargs = SMALL if image.startswith("vit") else {}
    recipe = ModelRecipe(image=image, image_size=224, image_kwargs=kwargs, text=TEXT, embed_dim=16)
    small = recipe.model_copy(update={"image_size": 96})
    source, trunk = build_trunk(recipe, seed=0), build_trunk(small, seed=1)
    torch.save(to_open_clip(source), tmp_path / "224.pt")
    name = f"image.backbone.{'head.' if image.startswith('resnet') else ''}pos_embed"
    before = source.state_dict()[name].clone()
    report = load(trunk, tmp_path / "224.pt")
    side = 6 if image.startswith("vit") else 3
    wanted = resample_abs_pos_embed(before.view(1, -1, before.shape[-1]), [side, side], num_prefix_tokens=1)
    torch.testing.assert_close(trunk.state_dict()[name].view_as(wanted), wanted, rtol=0, atol=0)
    assert list(report.resized) == [name]
    others = {n for n in source.state_dict() if n != name}
    assert all(torch.equal(source.state_dict()[n], trunk.state_dict()[n]) for n in others)


def test_other_shapes_and_other_towers_are_refused_and_nothing_is_copied(tmp_path: Path) -> None:
    recipe = ModelRecipe(image="vit_base_patch16_clip_224", image_kwargs=SMALL, text=TEXT, embed_dim=16)
    torch.save(to_open_clip(build_trunk(recipe, seed=0)), tmp_path / "clip.pt")
    torch.save(resnet50().state_dict(), tmp_path / "resnet.pt")
    wider = recipe.model_copy(update={"text": TEXT.model_copy(update={"width": 64})})
    resnet = recipe.model_copy(update={"image": "resnet50_clip", "image_kwargs": {}})
    for model, file, why in [
        (wider, "clip.pt", r"text\.blocks\.0\.norm1\.weight +64 +32"),
        (resnet, "clip.pt", r"stem\.conv1\.conv\.weight +32x3x3x3 +48x3x16x16"),
        (recipe, "resnet.pt", r"nothing for model\.image"),
    ]:
        trunk = build_trunk(model, seed=1)
        before = {n: t.clone() for n, t in trunk.state_dict().items()}
        with pytest.raises(UserError, match=why):
            load(trunk, tmp_path / file)
        assert all(torch.equal(t, before[n]) for n, t in trunk.state_dict().items())
    with pytest.raises(UserError, match="no such weight file"):
        load(build_trunk(recipe, seed=1), tmp_path / "none.pt")


def test_siglip_of_open_clip_both_ways(tmp_path: Path) -> None:
    logging.disable(logging.WARNING)
    base = open_clip.get_model_config("ViT-B-16-SigLIP")
    text = base["text_cfg"] | {"layers": 1, "vocab_size": 200}
    peer = shaken(open_clip.create_model("ViT-B-16-SigLIP", pretrained=None, text_cfg=text))
    logging.disable(logging.NOTSET)
    torch.save(peer.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    recipe = model_recipe("ViT-B-16-SigLIP")
    recipe = recipe.model_copy(update={"text": recipe.text.model_copy(update={"layers": 1, "vocab": 200})})
    trunk = build_trunk(recipe, seed=0).eval()
    report = load(trunk, tmp_path, objective="siglip")
    assert (report.missing, report.unused) == ([], [])
    assert report.temperature == ["siglip.logit_scale", "siglip.logit_bias"]
    ids = torch.randint(2, 200, (2, 64))
    with torch.no_grad():
        image, caption = trunk({IMAGE: pixels(224), CAPTION: ids}).values()
        for ours, want in (
            (image, peer.encode_image(pixels(224).float() / 127.5 - 1)),
            (caption, peer.encode_text(ids)),
        ):
            assert (ours - want).abs().max() < 1e-5 * want.abs().max()
    out = to_open_clip(trunk, peer.logit_scale, peer.logit_bias)
    original = {n: t.clone() for n, t in peer.state_dict().items()}
    peer.load_state_dict(out, strict=True)
    assert all(torch.equal(t, original[n]) for n, t in peer.state_dict().items())


def test_recipes_of_larger_models_come_from_open_clips_tables() -> None:
    for name, heads in {"ViT-L-14-quickgelu": 16, "ViT-H-14": 16, "ViT-S-16-alt": 6}.items():
        recipe, config = model_recipe(name), open_clip.get_model_config(name)
        with torch.device("meta"):
            trunk = Trunk(recipe)
            peer = open_clip.model.CLIP(**config)
        own = trunk.state_dict()
        shapes = {theirs: rule.to_theirs(own[ours]).shape for ours, (theirs, rule) in names(trunk, False).items()}
        assert shapes == {n: t.shape for n, t in peer.state_dict().items() if n != "logit_scale"}, name
        assert trunk.image.backbone.blocks[0].attn.num_heads == heads


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def test_a_run_starts_from_another_runs_weights_and_resumes_without_them(tmp_path: Path, shards: Path) -> None:
    first = recipe_data(shards, tmp_path / "first", steps=2, objectives={"clip": {}, "moco": {"queue": 24}})
    assert train_here(write_recipe(tmp_path / "first.yaml", first)) == 0
    kept = weights(tmp_path / "first")
    model = VIT | {"image_size": 32}
    data = recipe_data(shards, tmp_path / "next", steps=2, optimizer={"lr": 1e-12, "weight_decay": 0.0}, model=model)
    data["init"] = {"weights": str(tmp_path / "first"), "of": "teacher"}
    recipe = write_recipe(tmp_path / "next.yaml", data)
    assert train_here(recipe) == 0
    for name, tensor in weights(tmp_path / "next").items():
        if name.startswith("model.") and "pos_embed" not in name:
            torch.testing.assert_close(tensor, kept[name.replace("model.", "teacher.", 1)], rtol=0, atol=1e-6)
    assert len(losses(tmp_path / "next")) == 2

    (tmp_path / "first").rename(tmp_path / "moved")
    assert train_here(recipe, "steps=3") == 0
    assert train_here(recipe, "steps=4", "init.of=model") != 0


@pytest.mark.parametrize("format", ["auto", "native"])
def test_an_export_of_our_own_is_read_by_its_names(tmp_path: Path, format: str) -> None:
    recipe = ModelRecipe.model_validate(VIT)
    source, trunk = shaken(build_trunk(recipe, seed=5)), build_trunk(recipe, seed=0)
    save_export(source.state_dict(), recipe, tmp_path)
    report = load(trunk, tmp_path, format=format)
    assert not report.missing
    assert not report.unused
    assert all(torch.equal(t, source.state_dict()[n]) for n, t in trunk.state_dict().items())


def test_teacher_average_and_objectives_begin_at_the_first_weights(tmp_path: Path, shards: Path) -> None:
    source = shaken(build_trunk(parse_recipe(recipe_data(shards, tmp_path), "here").model, seed=5))
    torch.save(to_open_clip(source, 3.5), tmp_path / "clip.pt")
    changes = {"objectives": {"clip": {}, "moco": {"queue": 24}}, "ema": {}, "init": str(tmp_path / "clip.pt")}
    recipe = parse_recipe(recipe_data(shards, tmp_path / "run", **changes), "here")
    parts = assemble(recipe, 60, Process(0, 1, 0, torch.device("cpu")))
    for module in (parts.backend.trunk, parts.backend.teacher.copy, parts.backend.ema.copy):
        assert all(torch.equal(t, source.state_dict()[n]) for n, t in module.state_dict().items())
    assert parts.joint.by_name["clip"].logit_scale.item() == 3.5
