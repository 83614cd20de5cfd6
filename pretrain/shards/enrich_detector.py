"""Objects that a detector finds: any detection model of torchvision, with weights from a file.

Pixels are those the trainer decodes, scaled to 0..1; a model resizes and normalises them itself. Label 0 is the
background. `rows` are what the box head of an R-CNN (its last layer before the classes) makes of each final box.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.models import detection, get_model, get_model_weights, list_models

from pretrain.errors import UserError
from pretrain.shards.enrich import Annotated, Sample
from pretrain.shards.entries import image_part
from pretrain.shards.images import BadImage
from pretrain.shards.objects import SceneObject, box_of_pixels
from pretrain.weights.files import read_weights

LONGEST = 100  # short sides: models shrink the long side to some hundred pixels, and the short one then to none
LARGEST = torch.finfo(torch.float16).max


class Detector:
    """Finds objects of a score of at least `score`, the `most` best of an image.

    `labels`: a file of class names, one a line, the first of them class 1; without it torchvision's own, COCO's.
    `decode`: image bytes -> (H, W, 3) uint8, or BadImage. Raises UserError where the model, its weights and the
    labels do not fit together.
    """

    def __init__(
        self,
        model: str,
        weights: Path,
        decode: Callable[[bytes], np.ndarray],
        *,
        labels: Path | None = None,
        score: float = 0.5,
        most: int = 10,
        features: bool = False,
        device: str = "cpu",
    ) -> None:
        self.name = f"{model} {weights.name} score {score:g}"
        self.features = features
        self._names = _read_labels(labels) if labels else _own_labels(model)
        self._model = _load(model, weights, len(self._names))
        try:
            self._model.to(device)
        except RuntimeError as error:
            raise UserError(f"device {device}: {str(error).splitlines()[0]}") from error
        self._decode, self._score, self._most, self._device = decode, score, most, device
        self._seen: list[Tensor] = []
        if features:
            heads = getattr(self._model, "roi_heads", None)
            if not isinstance(heads, torch.nn.Module):
                raise UserError(f"{model} has no box head whose features could be stored: take an R-CNN for that")
            heads.register_forward_hook(self._see)

    def __call__(self, samples: Sequence[Sample]) -> list[Annotated | BadImage | None]:
        decoded = [self._pixels(sample) for sample in samples]
        images = [pixels for pixels in decoded if not isinstance(pixels, BadImage)]
        found = iter(self._detect(images) if images else [])
        return [pixels if isinstance(pixels, BadImage) else next(found) for pixels in decoded]

    def _pixels(self, sample: Sample) -> np.ndarray | BadImage:
        image = image_part(sample.members)
        try:
            pixels = self._decode(sample.members[image]) if image else None
        except BadImage as bad:
            return bad
        if pixels is None:
            return BadImage("no image")
        if max(pixels.shape[:2]) > LONGEST * min(pixels.shape[:2]):
            return BadImage("too narrow for a detector", f"{pixels.shape[1]} x {pixels.shape[0]} pixels")
        return pixels

    @torch.inference_mode()
    def _detect(self, images: Sequence[np.ndarray]) -> list[Annotated]:
        tensors = [torch.from_numpy(i).to(self._device).permute(2, 0, 1).float() / 255 for i in images]
        found = self._model(tensors)
        rows = [v.cpu() for v in self._seen] or [torch.empty(len(f["scores"]), 0) for f in found]
        return [
            self._annotated(image, {name: v.cpu() for name, v in f.items()}, r)
            for image, f, r in zip(images, found, rows)
        ]

    def _see(self, heads, inputs: tuple, output: tuple) -> None:
        """What the box head makes of the boxes that came out, an image an entry."""
        maps, _, sizes = inputs[:3]
        boxes = [found["boxes"] for found in output[0]]
        vectors = heads.box_head(heads.box_roi_pool(maps, boxes, sizes))
        self._seen = list(vectors.split([len(b) for b in boxes]))

    def _annotated(self, image: np.ndarray, found: dict[str, Tensor], vectors: Tensor) -> Annotated:
        height, width = image.shape[:2]
        objects: list[SceneObject] = []
        rows: list[Tensor] = []
        for box, label, score, vector in zip(*(found[n].tolist() for n in ("boxes", "labels", "scores")), vectors):
            if score < self._score or len(objects) == self._most:
                break  # the best come first
            x1, y1, x2, y2 = box
            try:
                corners = box_of_pixels((x1, y1, x2 - x1, y2 - y1), (width, height))
            except ValueError:  # too thin to be told from none
                continue
            objects.append(SceneObject(corners, self._names[label], (), round(score, 4)))
            rows.append(torch.cat([vector.float().clamp(-LARGEST, LARGEST), torch.tensor(corners)]))
        if not self.features:
            return Annotated(objects)
        return Annotated(objects, torch.stack(rows).numpy() if rows else np.empty((0, vectors.shape[1] + 4)))


def _own_labels(model: str) -> list[str]:
    known = list_models(module=detection)
    if model not in known:
        near = difflib.get_close_matches(model, known, n=3, cutoff=0.4) or known
        raise UserError(f"torchvision has no detection model {model!r}; there are {', '.join(near)}")
    return list(get_model_weights(model).DEFAULT.meta["categories"])


def _read_labels(path: Path) -> list[str]:
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"labels {path} cannot be read: {error}") from error
    return ["background", *(" ".join(name.split()) for name in names)]


def _load(model: str, weights: Path, classes: int) -> torch.nn.Module:
    built = get_model(model, weights=None, weights_backbone=None, num_classes=classes)
    try:
        built.load_state_dict(read_weights(weights))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{weights} is not for {model} of {classes - 1} classes: {first[:200]}") from error
    return built.eval()
