"""The encoder an evaluation is of: a checkpoint's, or its architecture before any training.

`Encoder` answers with unit embeddings; the kNN protocol wants what lies before the projection. So the trunk
is kept at hand here and asked for either.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.results import UNTRAINED
from pretrain.checkpoint import find_checkpoint
from pretrain.encoder import Encoder, stored_model
from pretrain.models.request import FeatureRequest
from pretrain.models.trunk import Trunk, build_trunk
from pretrain.weights.native import load_trunk
from pretrain.weights.which import Which

Output = Literal["embedding", "pooled"]


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

    @torch.inference_mode()
    def image_features(self, images: Tensor, output: Output) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, D) float32 unit rows on the encoder's device: embedding, or pooled before
        it.
        """
        request = FeatureRequest("image", "image", output)
        features = self.trunk({request: images.to(self.encoder.device)})[request]
        return F.normalize(features.float(), dim=-1)

    def width(self, output: Output) -> int:
        """D of `image_features`; asked of the tower itself for what lies before the projection."""
        if output == "embedding":
            return self.encoder.dim
        size = self.encoder.image_size
        return self.image_features(torch.zeros(1, 3, size, size, dtype=torch.uint8), output).shape[1]

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
