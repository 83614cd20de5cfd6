"""What is exported: one set of a checkpoint's weights, and what else the checkpoint knows of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint import Checkpoint, find_checkpoint
from pretrain.encoder import Encoder, stored_model
from pretrain.models.trunk import Trunk, build_trunk
from pretrain.recipe import ModelRecipe
from pretrain.weights.native import load_trunk
from pretrain.weights.which import Which


@dataclass(frozen=True)
class Source:
    """Weights on their way out."""

    checkpoint: Checkpoint
    model: ModelRecipe
    trunk: Trunk
    encoder: Encoder
    which: Which
    temperature: dict[str, float]
    """`logit_scale` (the log of the scale) and `logit_bias`, where an objective learned them."""

    @property
    def run(self) -> str:
        """Name of the run."""
        return str(self.checkpoint.meta["recipe"].get("name", self.checkpoint.path.name))


def open_source(path: Path, which: Which, device: str) -> Source:
    """The weights in a run folder (its newest whole checkpoint), a checkpoints folder, or one step's folder.

    Raises:
        UserError: no whole checkpoint there, it does not say which model it holds, or it holds no such weights.
    """
    checkpoint = find_checkpoint(path)
    model = stored_model(checkpoint)
    trunk = build_trunk(model, seed=0)
    load_trunk(trunk, checkpoint, which)
    return Source(checkpoint, model, trunk, Encoder(trunk, model, device=device), which, temperature(checkpoint))


def temperature(checkpoint: Checkpoint) -> dict[str, float]:
    """What the first objective with a learned temperature ended at."""
    scales = [n for n in checkpoint.names() if n.startswith("objective.") and n.endswith("logit_scale")]
    if not scales:
        return {}
    named = {part: scales[0].removesuffix("logit_scale") + part for part in ("logit_scale", "logit_bias")}
    return {part: checkpoint.read(n).item() for part, n in named.items() if n in checkpoint.names()}
