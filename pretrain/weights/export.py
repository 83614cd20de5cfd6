"""A run's weights in the form that another program loads, proven by loading them there.

The folder is written beside its place; pictures and texts are embedded by us and, from what was written, by the
consumer's own classes; only when every row agrees does the folder get its name. The code that did so is in the card.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pretrain.durable import fsync_folder
from pretrain.encoder import IMAGE
from pretrain.errors import UserError
from pretrain.models.request import FeatureRequest
from pretrain.weights.card import Proof, card
from pretrain.weights.source import Source
from pretrain.weights.targets import TARGETS, Target

COSINE = 0.9999
"""Least cosine of a row embedded by both; sums in another order cost less than 1e-6."""
SPREAD = 0.05
"""Most that rows may differ by, of the mean distance of ours from their centre: where all lie close together, as before
training, the cosine alone would let anything pass. Less than ROUNDING is no difference."""
ROUNDING = 1e-5
MOST = 64
"""Pictures of one's own that are embedded."""
TEXTS = [
    "",
    "a photo of a dog",
    "Two people in red coats watch a brown dog run over the wet grass; it's 7:30 in Zürich!",
    "longer than any context " * 40,
]


class NotVerified(Exception):
    """What the consumer's code needs is not installed."""


def export(source: Source, to: str, out: Path, *, images: Path | None = None, verify: bool = True) -> Proof | None:
    """Write `source` for the consumer `to` into the new folder `out`; what was verified, None where nothing was.

    `images`: a folder of pictures to verify with, beside noise and gradients.

    Raises:
        UserError: `out` exists, the consumer cannot hold this model, or it does not see what we see; nothing is left.
        NotVerified: the export is there and says so, but the consumer is not installed here.
    """
    target = TARGETS[to]
    if out.exists():
        raise UserError(f"{out} exists; an export goes into a new folder")
    pictures = own_pictures(source, images) + synthetic(source.model.image_size) if verify else []
    missing = None
    with _whole(out) as partial:
        target.write(source, partial)
        proof = None
        if verify:
            try:
                proof = prove(source, target, partial, pictures)
            except ModuleNotFoundError as error:
                missing = error
        (partial / "README.md").write_text(card(source, target, proof))
    if missing is not None:
        raise NotVerified(f"{missing}; pip install 'polyview[export]'")
    return proof


def prove(source: Source, target: Target, folder: Path, pictures: list[Image.Image]) -> Proof:
    """Embed by both.

    Raises:
        UserError: the consumer cannot load the folder, or a row differs.
        ModuleNotFoundError: the consumer is not installed.
    """
    theirs: dict[str, Any] = {"folder": str(folder)}
    with _refusals(target), _quiet():
        exec(target.code(source.model), theirs)
        images = theirs["embed_images"](pictures)
        texts = theirs["embed_texts"](TEXTS) if "embed_texts" in theirs else None
    image = _least(ours(source, target, pictures), images, target, "image")
    text = None if texts is None else _least(source.encoder.encode_text(TEXTS), texts, target, "text")
    for name, value in source.temperature.items():
        found = getattr(theirs.get("model"), name, None)
        if found is not None and abs(found.item() - value) > 1e-5:
            raise UserError(f"{target.library} has a {name} of {found.item()}, the run {value}")
    return Proof(len(pictures), image, len(TEXTS) if text is not None else 0, text)


@torch.inference_mode()
def ours(source: Source, target: Target, pictures: list[Image.Image]) -> np.ndarray:
    """(B, D) unit rows of what the consumer gives: embeddings, or the backbone's pooled features."""
    encoder = source.encoder
    resized = [encoder.preprocess(p) if target.resizes else _pixels(p) for p in pictures]
    if not target.backbone or source.trunk.image.projection is None:
        return encoder.encode_image(torch.stack(resized))
    request = FeatureRequest(IMAGE.tower, IMAGE.view, "pooled")
    pooled = source.trunk({request: torch.stack(resized).to(encoder.device)})[request]
    return F.normalize(pooled.float(), dim=-1).cpu().numpy()


def synthetic(size: int) -> list[Image.Image]:
    """Noise, noise of few colours, gradients and a black square, `size` pixels wide, always the same."""
    draw = np.random.default_rng(0)
    noise = [draw.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(3)]
    coarse = [draw.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(3)]
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    gradient = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 128), axis=-1).astype(np.uint8)
    smooth = [Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC) for c in coarse]
    return [*map(Image.fromarray, [*noise, gradient, np.zeros_like(gradient)]), *smooth]


def own_pictures(source: Source, folder: Path | None) -> list[Image.Image]:
    """The first pictures of a folder, cropped as the encoder crops.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    if folder is None:
        return []
    files = sorted(p for p in folder.glob("**/*") if p.suffix.lower() in Image.registered_extensions())
    if not files:
        raise UserError(f"--images {folder}: no pictures there")
    crops = [source.encoder.preprocess(file) for file in files[:MOST]]
    return [Image.fromarray(crop.permute(1, 2, 0).numpy()) for crop in crops]


def _pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _least(mine: np.ndarray, found: np.ndarray, target: Target, what: str) -> float:
    found = np.asarray(found)
    if found.shape != mine.shape:
        raise UserError(f"{target.library} gives {what} features of shape {found.shape}, the run {mine.shape}")
    least = float((mine.astype(np.float64) * found).sum(1).min())
    apart = float(np.linalg.norm(mine - found, axis=1).max())
    spread = float(np.linalg.norm(mine - mine.mean(0), axis=1).mean())
    if not (least > COSINE and apart < max(SPREAD * spread, ROUNDING)):  # NaN neither
        raise UserError(
            f"{target.library} sees other {what}s than the run: least cosine {least:.6f}, {apart:.2g} apart where ours "
            f"are spread by {spread:.2g}; a cosine above {COSINE} is needed, and {SPREAD} of the spread. Nothing was "
            "exported"
        )
    return least


@contextmanager
def _refusals(target: Target) -> Iterator[None]:
    """The consumer's own errors as ours."""
    try:
        yield
    except (ModuleNotFoundError, UserError):
        raise
    except Exception as error:  # whatever its classes refuse with
        raise UserError(
            f"{target.library} cannot load this model: {type(error).__name__}: {str(error)[:400]}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries tell of their loading."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` in one step, or is gone."""
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{partial} is in the way: of an export that goes on, or one that was killed; remove it"
        ) from None
    try:
        yield partial
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        fsync_folder(partial)
        os.rename(partial, out)
        fsync_folder(out.parent)
    except OSError as error:
        raise UserError(f"{out} was not written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
