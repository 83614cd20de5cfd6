"""The encoder: unit rows, one fingerprint a space, errors that say which image or file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain import encoder as encoding
from pretrain.checkpoint import CheckpointWriter, slice_for_rank
from pretrain.encoder import Encoder
from pretrain.errors import UserError
from pretrain.models.trunk import build_trunk
from pretrain.recipe import ModelRecipe, TextRecipe
from pretrain.views.decode import DamagedSample
from pretrain.views.geometry import eval_crop

MODEL = ModelRecipe(
    image="vit_xsmall_patch16_clip_224",
    image_size=32,
    image_kwargs={"depth": 1},
    text=TextRecipe(width=32, layers=1, heads=2),
    embed_dim=16,
)


def build(model: ModelRecipe = MODEL, seed: int = 0, **kwargs: str) -> Encoder:
    return Encoder(build_trunk(model, seed=seed), model, device="cpu", **kwargs)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def save(root: Path, model: ModelRecipe, trunk: torch.nn.Module, step: int = 1) -> None:
    writer = CheckpointWriter(root, rank=0, world=1, attempt="a1")
    tensors = {f"model.{name}": t for name, t in trunk.state_dict().items()}
    meta = {"recipe": {"model": model.model_dump(mode="json")}}
    writer.save(step, slice_for_rank(tensors, 0, 1), meta)
    writer.wait()


def test_rows_are_unit_and_do_not_depend_on_the_batch() -> None:
    encoder = build()
    pictures = [picture(i) for i in range(5)]
    whole, split = encoder.encode_image(pictures), encoder.encode_image(pictures, batch_size=2)
    assert whole.shape == (5, 16)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(whole, split, atol=1e-5)
    texts = ["a dog", "a much longer caption about two dogs", ""]
    found = encoder.encode_text(texts)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found, np.concatenate([encoder.encode_text([t]) for t in texts]), atol=1e-5)
    assert encoder.encode_text([]).shape == (0, 16)
    assert encoder.encode_image([]).shape == (0, 16)


def test_every_form_of_an_image_gives_the_same_row(tmp_path: Path) -> None:
    encoder, pixels = build(), picture()
    (tmp_path / "a.png").write_bytes(png(pixels))
    forms = [pixels, png(pixels), tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels)]
    rows = encoder.encode_image(forms)
    assert np.abs(rows - rows[0]).max() < 1e-6
    ready = torch.stack([encoder.preprocess(pixels)])
    assert ready.shape == (1, 3, 32, 32)
    np.testing.assert_allclose(encoder.encode_image(ready), rows[:1], atol=1e-6)


def test_a_damaged_image_is_named_by_its_position(tmp_path: Path) -> None:
    encoder = build()
    with pytest.raises(DamagedSample, match=r"image 2: .*not an image"):
        encoder.encode_image([picture(), picture(), b"no image at all", picture()], batch_size=2)
    (tmp_path / "cut.png").write_bytes(png(picture())[:200])
    with pytest.raises(DamagedSample, match=r"image 0 .*cut\.png"):
        encoder.encode_image([tmp_path / "cut.png"])
    with pytest.raises(UserError, match=r"image 1: .*none\.png"):
        encoder.encode_image([picture(), tmp_path / "none.png"])


def test_what_is_no_list_of_images_or_texts_is_refused() -> None:
    encoder = build()
    for wrong in (
        torch.zeros(2, 3, 32, 32),
        torch.zeros(2, 3, 48, 48, dtype=torch.uint8),
        "a.png",
        [picture()[..., 0]],
    ):
        with pytest.raises(UserError):
            encoder.encode_image(wrong)
    with pytest.raises(UserError, match="list of texts"):
        encoder.encode_text("a dog")
    with pytest.raises(UserError, match="given NoneType, int"):
        encoder.encode_text(["a dog", 3, None])
    with pytest.raises(UserError, match="device 'no' cannot be used"):
        Encoder(build_trunk(MODEL, seed=0), MODEL, device="no")


def test_an_image_only_encoder_says_so() -> None:
    encoder = build(MODEL.model_copy(update={"text": None}))
    assert not encoder.has_text
    assert encoder.encode_image([picture()]).shape == (1, 16)
    assert len(encoder.fingerprint) == 64
    with pytest.raises(UserError, match="no text tower"):
        encoder.encode_text(["a dog"])


def test_the_fingerprint_is_of_the_space() -> None:
    plain = build().fingerprint
    assert plain == build().fingerprint
    assert plain == build(precision="bf16").fingerprint
    dropout = MODEL.model_copy(update={"text": MODEL.text.model_copy(update={"dropout": 0.1})})
    assert plain == build(dropout).fingerprint

    trunk = build_trunk(MODEL, seed=0)
    with torch.no_grad():
        trunk.text.norm.bias[3] += 1e-6
    different = [
        Encoder(trunk, MODEL, device="cpu"),
        build(seed=1),
        build(MODEL.model_copy(update={"mean": (0.5, 0.5, 0.5)})),
        build(MODEL.model_copy(update={"activation": "quick_gelu"})),
        build(MODEL.model_copy(update={"text": None})),
    ]
    assert len({plain, *(e.fingerprint for e in different)}) == 6


def test_bf16_is_near() -> None:
    exact, coarse = (build(precision=p).encode_text(["a dog", "two cats"]) for p in ("fp32", "bf16"))
    assert (exact * coarse).sum(1).min() > 0.999


def test_it_is_frozen_and_in_evaluation_mode() -> None:
    trunk = build_trunk(MODEL, seed=0)
    Encoder(trunk, MODEL, device="cpu")
    assert not trunk.training
    assert not any(p.requires_grad for p in trunk.parameters())


def test_load_takes_a_run_its_checkpoints_or_a_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run / "checkpoints", MODEL, build_trunk(MODEL, seed=1), step=1)
    save(run / "checkpoints", MODEL, build_trunk(MODEL, seed=2), step=2)
    newest, oldest = build(seed=2), build(seed=1)
    for path in (run, run / "checkpoints", str(run / "checkpoints" / "step_00000002")):
        loaded = encoding.load(path, device="cpu")
        assert loaded.fingerprint == newest.fingerprint
    loaded = encoding.load(run / "checkpoints" / "step_00000001", device="cpu")
    assert loaded.fingerprint == oldest.fingerprint
    np.testing.assert_array_equal(loaded.encode_image([picture()]), oldest.encode_image([picture()]))


def test_load_refuses_what_is_no_checkpoint_or_of_another_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "step_00000007").mkdir()
    for path in ("none", "empty", "step_00000007"):
        with pytest.raises(UserError, match=path):
            encoding.load(tmp_path / path)
    wider = MODEL.model_copy(update={"embed_dim": 24})
    save(tmp_path / "other", wider, build_trunk(MODEL, seed=0))
    with pytest.raises(UserError, match=r"text\.projection\.weight +24x32 +16x32"):
        encoding.load(tmp_path / "other")


def test_without_a_projection_the_encoder_is_as_wide_as_its_tower() -> None:
    encoder = build(MODEL.model_copy(update={"text": None, "embed_dim": None}))
    trunk = build_trunk(encoder.model, seed=0)
    assert encoder.dim == trunk.pooled_dim
    assert encoder.encode_image([picture()]).shape == (1, encoder.dim)


def test_the_shortest_side_may_be_wider_than_the_crop() -> None:
    plain, wide = build(), build(MODEL.model_copy(update={"eval_resize": 36}))
    photo = picture()
    shortest_36 = eval_crop(photo, 36)
    assert wide.preprocess(photo).shape == (3, 32, 32)
    assert torch.equal(wide.preprocess(photo), shortest_36[:, 2:34, 2:34])
    assert wide.fingerprint != plain.fingerprint
    assert build(MODEL.model_copy(update={"eval_resize": 32})).fingerprint == plain.fingerprint
