"""A trained trunk put to work: images and texts in, unit vectors and the fingerprint of their space out.

Frozen, in evaluation mode, fp32 unless asked otherwise. The fingerprint is a hash of all that makes the
embedding space and of nothing else: two files of the same weights have one fingerprint, and vectors of
different fingerprints must never be compared. This module trains nothing and stores no vectors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from pretrain.checkpoint import Checkpoint, find_checkpoint
from pretrain.errors import UserError
from pretrain.models.request import FeatureRequest
from pretrain.models.trunk import Trunk, build_trunk
from pretrain.recipe import ModelRecipe, TextRecipe
from pretrain.views.decode import DamagedSample, decode
from pretrain.views.geometry import eval_crop
from pretrain.views.text import Tokenizer, build_tokenizer
from pretrain.weights.naming import exported
from pretrain.weights.native import is_export, load_trunk, open_export
from pretrain.weights.which import Which

ImageLike = bytes | str | Path | Image.Image | np.ndarray
IMAGE = FeatureRequest("image", "image")
TEXT = FeatureRequest("text", "text")
RULES = {"crop": "shortest side bicubic antialiased, centre", "pooling": "embedding", "norm": "unit L2"}
"""What the code below does to a sample: part of the fingerprint, changed when it changes what comes out."""
NOT_THE_SPACE: Any = {
    "sync_batchnorm": True, "patch_dropout": True, "regions": True, "lock": True, "text": {"dropout", "tokenizer"},
}  # fmt: skip
"""What a recipe says of training alone (and a path: the tokenizer's own digest is in the fingerprint)."""
ADDED = ("leff",)
ADDED_TEXT = ("causal", "pool", "projection_bias", "activation", "norm_eps")
"""Fields younger than the first fingerprints: said only where they differ from what was always so."""


class Encoder:
    """`encode_image` and `encode_text` of one trained trunk. It takes the trunk over: frozen, on `device`."""

    def __init__(
        self,
        trunk: Trunk,
        model: ModelRecipe,
        *,
        device: str | torch.device = "auto",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.model = model
        self.dim = trunk.embed_dim
        self.image_size = model.image_size
        self.has_text = model.text is not None
        self.device = _device(device)
        self._autocast = precision == "bf16"
        self._trunk = trunk.to(self.device).eval().requires_grad_(False)

    @cached_property
    def fingerprint(self) -> str:
        """sha256, hex, of weights as fp32, architecture, preprocessing, tokenizer, pooling, normalisation.

        Independent of the file, the device and the compute dtype.
        """
        digest = hashlib.sha256(json.dumps(self._space(), sort_keys=True).encode())
        for name, tensor in sorted(exported(self._trunk).items()):
            if tensor.is_floating_point():  # counters (batches seen) do not shape the space
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.float().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def _space(self) -> dict[str, Any]:
        model = self.model.model_dump(mode="json", exclude=NOT_THE_SPACE)
        if self.model.eval_resize in (None, self.image_size):  # the same pixels, whether it is said or not
            del model["eval_resize"]
        for section, kind, younger in ((model, ModelRecipe, ADDED), (model["text"] or {}, TextRecipe, ADDED_TEXT)):
            for name in younger:
                if section.get(name) == kind.model_fields[name].default:
                    section.pop(name, None)
        return {**RULES, "model": model, "tokenizer": self._tokenizer.digest() if self.has_text else None}

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        built = build_tokenizer(self.model.text)
        if built is None:
            raise UserError("this encoder has no text tower (model.text: null): it encodes images only")
        return built

    def preprocess(self, image: ImageLike) -> Tensor:
        """One image as the tower sees it: uint8 (3, S, S).

        Encoded bytes, the path of an image file, a PIL image, or RGB pixels as uint8 (H, W, 3).

        Raises:
            DamagedSample: the image cannot be used.
            UserError: no such file, or an array of another type or shape.
        """
        return eval_crop(_pixels(image), self.image_size, resize=self.model.eval_resize)

    def encode_image(self, images: Sequence[ImageLike] | Tensor, *, batch_size: int = 64) -> np.ndarray:
        """(B, dim) float32, unit rows, of a list of images or of preprocessed uint8 (B, 3, S, S).

        Raises:
            DamagedSample: an image cannot be used; the message has its position.
            UserError: a tensor or array of another type or shape.
        """
        batches = self._image_batches(images, batch_size)
        return self._encode(IMAGE, batches, len(images))

    def encode_text(self, texts: Sequence[str], *, batch_size: int = 256) -> np.ndarray:
        """(B, dim) float32, unit rows. Texts longer than the tower's context are cut.

        Raises:
            UserError: the encoder has no text tower, or `texts` is no list of strings.
        """
        if isinstance(texts, str):
            raise UserError("encode_text takes a list of texts; put the one text into a list")
        if wrong := {type(text).__name__ for text in texts if not isinstance(text, str)}:
            raise UserError(f"encode_text takes a list of texts; given {', '.join(sorted(wrong))}")
        tokens = (self._tokenizer(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size))
        return self._encode(TEXT, tokens, len(texts))

    def _image_batches(self, images: Sequence[ImageLike] | Tensor, batch_size: int) -> Iterator[Tensor]:
        if isinstance(images, Tensor):
            self._check(images)
            yield from images.split(batch_size)
            return
        if isinstance(images, str | bytes | Path | Image.Image):
            raise UserError("encode_image takes a list of images; put the one image into a list")
        for start in range(0, len(images), batch_size):
            rows = enumerate(images[start : start + batch_size], start)
            yield torch.stack([self._preprocess_at(position, image) for position, image in rows])

    def _preprocess_at(self, position: int, image: ImageLike) -> Tensor:
        named = f"image {position} ({image})" if isinstance(image, str | Path) else f"image {position}"
        try:
            return self.preprocess(image)
        except DamagedSample as damage:
            raise DamagedSample(f"{named}: {damage.reason}") from damage
        except UserError as error:
            raise UserError(f"image {position}: {error}") from None

    def _check(self, images: Tensor) -> None:
        expected = (3, self.image_size, self.image_size)
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise UserError(
                f"preprocessed images must be uint8 (B, {', '.join(map(str, expected))}), "
                f"given {images.dtype} {tuple(images.shape)}; `preprocess` makes them"
            )

    @torch.inference_mode()
    def _encode(self, request: FeatureRequest, batches: Iterator[Tensor], rows: int) -> np.ndarray:
        out = np.empty((rows, self.dim), dtype=np.float32)
        done = 0
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
                features = self._trunk({request: batch.to(self.device)})[request]
            out[done : done + len(batch)] = F.normalize(features.float(), dim=-1).cpu().numpy()
            done += len(batch)
        return out


def load(
    path: str | Path,
    device: str | torch.device = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    weights: Which = "model",
) -> Encoder:
    """The encoder in a run folder (its newest whole checkpoint), a checkpoints folder, one step's, or an export's.

    `weights`: what was trained, its momentum teacher (DINO's figures are its teacher's), or its running average.

    Raises:
        UserError: there is no whole checkpoint, its tensors are not those of the model its recipe names, or it holds
            no such weights.
    """
    if is_export(path) and weights == "model":
        trunk, model = open_export(path)
        return Encoder(trunk, model, device=device, precision=precision)
    checkpoint = find_checkpoint(path)
    model = stored_model(checkpoint)
    trunk = build_trunk(model, seed=0)
    load_trunk(trunk, checkpoint, weights)
    return Encoder(trunk, model, device=device, precision=precision)


def stored_model(checkpoint: Checkpoint) -> ModelRecipe:
    """The model a checkpoint is of; UserError where it does not say so."""
    try:
        return ModelRecipe.model_validate(checkpoint.meta["recipe"]["model"])
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{checkpoint.path} does not say which model it holds (meta recipe.model: {error})") from None


def _pixels(image: ImageLike) -> np.ndarray:
    """RGB uint8 (H, W, 3) of whatever was given."""
    if isinstance(image, bytes | bytearray | memoryview):
        return decode(bytes(image))
    if isinstance(image, str | Path):
        return decode(_read(Path(image)))
    if isinstance(image, Image.Image):
        if image.mode[0] in "IF":  # Pillow's conversion clips these to white
            raise UserError(f"a PIL image of mode {image.mode} has no 8-bit colours; give the file's bytes instead")
        return np.array(image.convert("RGB"))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        if image.size == 0:
            raise DamagedSample(f"image has no pixels: {image.shape}")
        return np.ascontiguousarray(image)
    given = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
    raise UserError(f"an image is bytes, a path, a PIL image or uint8 pixels (H, W, 3); given {given}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # no such device, no driver, torch without CUDA
        raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
