"""Exports: loaded by the consumers' own classes with the code of the card, refused where they would see otherwise."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import polyview
from pretrain.__main__ import main
from pretrain.checkpoint import CheckpointWriter, find_checkpoint, slice_for_rank
from pretrain.errors import UserError
from pretrain.models.trunk import build_trunk
from pretrain.recipe import ModelRecipe
from pretrain.weights import targets
from pretrain.weights.export import TEXTS, export, synthetic
from pretrain.weights.source import open_source
from tests.runs import train_here
from tests.tiny import picture, recipe_data, write_recipe, write_shards

TEXT = {"width": 32, "layers": 2, "heads": 2, "context": 16}
SIGLIP_TEXT = TEXT | {"causal": False, "pool": "last", "projection_bias": True, "activation": "gelu_tanh"}
MODELS: dict[str, dict[str, Any]] = {
    "clip": {"image": "vit_xsmall_patch16_clip_224", "image_size": 32, "image_kwargs": {"depth": 1}, "text": TEXT},
    "quick": {
        "image": "vit_xsmall_patch16_clip_224", "image_size": 32, "image_kwargs": {"depth": 1}, "text": TEXT,
        "activation": "quick_gelu", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
    },
    "clip-resnet": {"image": "resnet50_clip", "image_size": 64, "text": TEXT},
    "resnet": {"image": "resnet18", "image_size": 64, "text": TEXT},
    "scenes": {"image": "resnet18", "image_size": 48, "image_kwargs": {"layers": [1, 1, 1, 1]}, "text": TEXT},
    "images": {"image": "resnet18", "image_size": 64, "eval_resize": 72, "text": None, "embed_dim": None},
    "siglip": {
        "image": "vit_base_patch16_siglip_224", "image_size": 32, "embed_dim": None, "mean": (0.5, 0.5, 0.5),
        "image_kwargs": {"embed_dim": 32, "depth": 1, "num_heads": 2}, "std": (0.5, 0.5, 0.5),
        "text": SIGLIP_TEXT,
    },
    "siglip-resnet": {"image": "resnet18", "image_size": 64, "embed_dim": None, "text": SIGLIP_TEXT},
    "leff": {"image": "vit_tiny_patch16_224", "image_size": 32, "image_kwargs": {"depth": 1}, "leff": 1, "text": None},
    "regions": {
        "image": "vit_xsmall_patch16_clip_224", "image_size": 32, "image_kwargs": {"depth": 2}, "text": TEXT,
        "regions": {"blocks": 1},
    },
    "plain": {"image": "vit_tiny_patch16_224", "image_size": 32, "text": TEXT},
    "max": {
        "image": "vit_xsmall_patch16_clip_224", "image_size": 32, "image_kwargs": {"depth": 1},
        "text": TEXT | {"pool": "max"},
    },
}  # fmt: skip


def save(name: str, folder: Path, **text: Any) -> Path:
    """A run folder of a model before training, its norms and biases moved off their first values, and a temperature."""
    data = {"embed_dim": 16} | MODELS[name]
    model = ModelRecipe.model_validate(data | ({"text": data["text"] | text} if text else {}))
    trunk = build_trunk(model, seed=1)
    torch.manual_seed(0)
    tensors = {f"model.{n}": t + 0.2 * torch.rand_like(t) if t.ndim == 1 else t for n, t in trunk.state_dict().items()}
    tensors |= {"objective.siglip.logit_scale": torch.tensor([3.3])}
    if name.startswith("siglip"):
        tensors["objective.siglip.logit_bias"] = torch.tensor([-9.5])
    writer = CheckpointWriter(folder / "checkpoints", rank=0, world=1, attempt="a1")
    meta = {"recipe": {"name": name, "model": model.model_dump(mode="json")}}
    writer.save(1, slice_for_rank(tensors, 0, 1), meta)
    writer.wait()
    return folder


def exported(run: Path, to: str, out: Path, which: Any = "model", **kwargs: Any) -> Path:
    assert export(open_source(run, which, "cpu"), to, out, **kwargs) is not None
    return out


def run_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the card's code defines, when somebody runs it in the folder."""
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    with monkeypatch.context() as inside:
        inside.chdir(folder)
        exec(block, found)
    return found


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((np.asarray(a, np.float64) * np.asarray(b)).sum(1).min())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with captions, a temperature that moved, and an average of the weights."""
    folder = tmp_path_factory.mktemp("trained")
    shards = write_shards(folder / "flickr")
    data = recipe_data(shards, folder / "run", model=MODELS["clip"] | {"embed_dim": 16}, ema={}, steps=4)
    assert train_here(write_recipe(folder / "r.yaml", data)) == 0
    return folder / "run"


FILES = {
    "open_clip": {"open_clip_config.json", "open_clip_model.safetensors"},
    "timm": {"config.json", "model.safetensors"},
    "hf": {
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    },
    "safetensors": {"model.safetensors"},
    "onnx": {"image.onnx", "text.onnx", "tokenizer.json", "tokenizer_config.json"},
}  # fmt: skip


@pytest.mark.parametrize("to", list(FILES))
def test_a_trained_run_is_embedded_alike_by_the_cards_code(trained, tmp_path, monkeypatch, to):
    folder = exported(trained, to, tmp_path / "out")
    assert {p.name for p in folder.iterdir()} == FILES[to] | {"README.md"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    encoder = polyview.load(trained, device="cpu")
    card = (folder / "README.md").read_text()
    for fact in (encoder.fingerprint, "| steps | 4 |", "| samples seen | 48 |", "| data | flickr |", "8 images"):
        assert fact in card
    assert str(trained.parent) not in card

    theirs = run_card(folder, monkeypatch)
    pictures = synthetic(32)[:5]  # another number than the graphs were traced with
    expected = encoder.encode_image(pictures)
    if to == "timm":  # the backbone, before the projection
        with torch.inference_mode():
            backbone = open_source(trained, "model", "cpu").trunk.image
            pixels = torch.stack([encoder.preprocess(p) for p in pictures])
            expected = torch.nn.functional.normalize(backbone(pixels, ("pooled",))["pooled"], dim=-1).numpy()
    assert cosine(theirs["embed_images"](pictures), expected) > 0.999999
    if to != "timm":
        assert cosine(theirs["embed_texts"](TEXTS[:3]), encoder.encode_text(TEXTS[:3])) > 0.999999
    scale = find_checkpoint(trained).read("objective.clip.logit_scale").item()
    assert f"| logit_scale (log) | {scale} |" in card
    if to in ("open_clip", "hf"):
        assert theirs["model"].logit_scale.item() == pytest.approx(scale, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("quick", "open_clip"), ("quick", "hf"), ("quick", "timm"), ("clip-resnet", "open_clip"),
        ("resnet", "open_clip"), ("scenes", "timm"), ("images", "timm"), ("images", "safetensors"), ("siglip", "hf"),
        ("siglip-resnet", "open_clip"), ("leff", "safetensors"), ("regions", "open_clip"),
    ],
)  # fmt: skip
def test_models_go_where_they_can(tmp_path, name, to):
    """`exported` verifies them: by consumers' classes, with their own preprocessing, tokenizers and temperature."""
    folder = exported(save(name, tmp_path / "run"), to, tmp_path / "out")
    assert "least cosine" in (folder / "README.md").read_text()
    if (name, to) == ("siglip", "hf"):
        from transformers import SiglipModel

        model = SiglipModel.from_pretrained(folder)
        assert (model.logit_scale.item(), model.logit_bias.item()) == (pytest.approx(3.3), -9.5)


@pytest.mark.parametrize(
    ("name", "to", "why"),
    [
        ("images", "open_clip", "have a text tower"),
        ("scenes", "open_clip", "without model.image_kwargs, here layers"),
        ("max", "open_clip", "no model.text.pool: max"), ("resnet", "hf", "neither CLIP's nor SigLIP's ViT"),
        ("images", "hf", "have a text tower"), ("leff", "timm", "model.leff 1"),
        ("plain", "open_clip", "for 224 pixels alone, here model.image_size is 32"),
        ("plain", "hf", "normalises the patches before the blocks"),
    ],
)  # fmt: skip
def test_what_a_consumer_cannot_hold_is_refused_by_name(tmp_path, name, to, why):
    run = save(name, tmp_path / "run")
    with pytest.raises(UserError, match=why):
        exported(run, to, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_pieces_of_text_go_with_their_file(tmp_path, monkeypatch):
    """A SentencePiece vocabulary laid out as SigLIP's: end is 1."""
    import sentencepiece

    prefix = tmp_path / "spiece"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a photo of a dog", "two people in red coats", "wet grass in zurich"] * 9),
        model_prefix=str(prefix), vocab_size=24, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    run = save("siglip", tmp_path / "run", tokenizer=str(prefix.with_suffix(".model")), vocab=24)
    encoder = polyview.load(run, device="cpu")
    expected, fingerprint = encoder.encode_text(TEXTS), encoder.fingerprint
    for to in ("hf", "safetensors"):
        exported(run, to, tmp_path / to)
    shutil.rmtree(run)
    prefix.with_suffix(".model").unlink()
    assert cosine(run_card(tmp_path / "hf", monkeypatch)["embed_texts"](TEXTS), expected) > 0.999999
    assert polyview.load(tmp_path / "safetensors", device="cpu").fingerprint == fingerprint
    assert str(tmp_path).encode() not in (tmp_path / "safetensors" / "model.safetensors").read_bytes()


def test_the_average_is_exported_and_read_back(trained, tmp_path):
    folder = exported(trained, "safetensors", tmp_path / "out", "ema")
    ema = polyview.load(trained, device="cpu", weights="ema").fingerprint
    assert polyview.load(folder, device="cpu").fingerprint == ema != polyview.load(trained, device="cpu").fingerprint
    assert "a running average of the trained weights" in (folder / "README.md").read_text()
    with pytest.raises(UserError, match="holds no teacher"):
        open_source(trained, "teacher", "cpu")


def test_another_programs_weights_are_not_taken_for_ours(trained, tmp_path):
    folder = exported(trained, "timm", tmp_path / "out")
    with pytest.raises(UserError, match="does not say which model it holds"):
        polyview.load(folder, device="cpu")


@pytest.mark.parametrize("what", ["preprocessing", "weights", "temperature"])
def test_an_export_that_sees_otherwise_is_refused_and_removed(trained, tmp_path, monkeypatch, what):
    """The consumer is open_clip itself; what was written for it is spoilt."""
    from safetensors.torch import load_file, save_file

    whole = targets.TARGETS["open_clip"]

    def spoilt(source: Any, folder: Path) -> None:
        whole.write(source, folder)
        file, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
        tensors, said = load_file(file), json.loads(config.read_text())
        if what == "preprocessing":
            said["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.4]
        tensors["ln_final.bias"] += 0.1 * torch.arange(32) * (what == "weights")
        tensors["logit_scale"] += 0.1 * (what == "temperature")
        config.write_text(json.dumps(said))
        save_file(tensors, file)

    monkeypatch.setitem(targets.TARGETS, "open_clip", dataclasses.replace(whole, write=spoilt))
    told = {"preprocessing": "sees other images", "weights": "sees other texts", "temperature": "a logit_scale of"}
    with pytest.raises(UserError, match=told[what]):
        exported(trained, "open_clip", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_consumer_that_is_not_installed_leaves_it_unverified(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not there
    asked = ["export", str(trained), "--to", "hf", "--out"]
    assert main([*asked, str(tmp_path / "a")]) == 1
    assert "NOT verified" in (told := capsys.readouterr().err)
    assert "polyview[export]" in told
    assert main([*asked, str(tmp_path / "b"), "--no-verify"]) == 0
    for name in "ab":
        assert "**Not verified**" in (tmp_path / name / "README.md").read_text()


def test_the_command_takes_pictures_and_touches_no_folder_that_exists(trained, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        (tmp_path / "photos" / f"{i}.png").write_bytes(picture(i, size=50))
    asked = ["export", str(trained), "--to", "timm", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*asked, "--images", str(tmp_path / "photos")]) == 0
    assert "verified: 11 images" in capsys.readouterr().out
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert main(asked) == 2
    assert "exists; an export goes into a new folder" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert main([*asked[:-3], str(tmp_path / "new"), "--images", str(tmp_path / "out")]) == 2
    assert "no pictures there" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "new.partial").mkdir()
    assert main([*asked[:-3], str(tmp_path / "new")]) == 2
    assert "new.partial is in the way" in capsys.readouterr().err


def test_synthetic_pictures_are_always_the_same():
    first, again = synthetic(16), synthetic(16)
    assert [p.tobytes() for p in first] == [p.tobytes() for p in again]
    assert len({p.tobytes() for p in first}) == len(first)
    assert all(isinstance(p, Image.Image) and p.size == (16, 16) for p in first)
