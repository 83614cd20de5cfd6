"""The encoder an evaluation is of: a checkpoint's, or its architecture before any training.

`Encoder` answers with unit embeddings; the kNN protocol wants what lies before the projection. So the trunk
is kept at hand here and asked for either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from downstream.results import UNTRAINED
from pretrain.checkpoint import find_checkpoint
from pretrain.encoder import Encoder, stored_model
from pretrain.models.request import FeatureRequest
from pretrain.models.trunk import Trunk, build_trunk
from pretrain.weights.native import load_trunk
from pretrain.weights.which import Which

Output = Literal["embedding", "pooled"]


class Towers(Protocol):
    """What an evaluation asks for vectors: a checkpoint's encoder here, in training the weights that are trained."""

    name: str
    """What messages call it."""

    @property
    def device(self) -> torch.device: ...

    @property
    def image_size(self) -> int: ...

    @property
    def has_text(self) -> bool: ...

    def preprocess(self, image: bytes) -> Tensor:
        """An encoded image as the tower sees it, uint8 (3, S, S); DamagedSample where it cannot be used."""

    def image_features(self, images: Tensor, outputs: Sequence[Output]) -> dict[Output, Tensor]:
        """(B, 3, S, S) uint8 -> (B, D) float32 on the device for each output: the embedding, or pooled before it; of
        the length the tower gave them."""

    def text_vectors(self, texts: list[str]) -> Tensor:
        """(B, D) float32 unit rows."""


@dataclass
class Weights:
    """An encoder, what it is called in a result, and where it comes from."""

    encoder: Encoder
    trunk: Trunk
    name: str
    run: str
    step: int
    untrained: bool
    which: Which = "model"

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def image_size(self) -> int:
        return self.encoder.image_size

    @property
    def has_text(self) -> bool:
        return self.encoder.has_text

    def preprocess(self, image: bytes) -> Tensor:
        return self.encoder.preprocess(image)

    @torch.inference_mode()
    def image_features(self, images: Tensor, outputs: Sequence[Output]) -> dict[Output, Tensor]:
        requests: dict[Output, FeatureRequest] = {o: FeatureRequest("image", "image", o) for o in outputs}
        images = images.to(self.device)
        found = self.trunk(dict.fromkeys(requests.values(), images))
        return {output: found[request].float() for output, request in requests.items()}

    def text_vectors(self, texts: list[str]) -> Tensor:
        return torch.from_numpy(self.encoder.encode_text(texts, batch_size=len(texts)))

    def origin(self) -> dict[str, Any]:
        """What a result says of the weights it is of."""
        role = "untrained" if self.untrained else "trained"
        return {"run": self.run, "step": self.step, "role": role, "fingerprint": self.encoder.fingerprint}


def open_weights(
    path: Path,
    *,
    untrained: bool = False,
    weights: Which = "model",
    device: str | torch.device = "auto",
    name: str | None = None,
) -> Weights:
    """The encoder of a run folder (its newest whole checkpoint), a checkpoints folder, or one step's folder.

    `untrained`: the same architecture with the weights the run began with (recipe and seed are the
    checkpoint's). `weights`: what was trained, or its momentum teacher or running average. `name`: what the result
    calls it; else "RUN@step_00000100", with "-teacher" or "-ema" behind it, or "untrained".

    Raises:
        UserError: no whole checkpoint there, it does not say which model it holds, or it holds no such weights.
    """
    checkpoint = find_checkpoint(path)
    model, recipe = stored_model(checkpoint), checkpoint.meta["recipe"]
    trunk = build_trunk(model, seed=recipe.get("seed", 0))
    if not untrained:
        load_trunk(trunk, checkpoint, weights)
    run = str(recipe.get("name", path.resolve().name))
    copied = "" if weights == "model" else f"-{weights}"
    called = name or (UNTRAINED if untrained else f"{run}@{checkpoint.path.name}{copied}")
    step = 0 if untrained else checkpoint.step
    return Weights(Encoder(trunk, model, device=device), trunk, called, run, step, untrained, weights)
