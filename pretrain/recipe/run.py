"""The recipe's sections that say how a run goes: optimizer, schedule, first weights, average, checkpoints, log."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pretrain.recipe.base import Part


class OptimizerRecipe(Part):
    """AdamW as CLIP used it, SGD, or LARS: of the trunk and of the objectives' own parameters alike."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """lars: SGD with every tensor's gradient scaled to the tensor's length, as SwAV (apex's LARC, not clipped)."""
    lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's."""
    eps: float = 1e-6
    """AdamW's."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of sgd and lars; the learning rate is outside of it, as torch has it."""
    nesterov: bool = False
    """Of sgd and lars: look one step of momentum ahead."""
    trust_coefficient: float = Field(default=0.001, gt=0)
    """Of lars: length of an update, relative to the tensor, at learning rate 1."""
    weight_decay: float = Field(default=0.2, ge=0)
    """Decoupled in adamw; in sgd and lars it is added to the gradient."""
    weight_decay_final: float | None = Field(default=None, ge=0)
    """Half a cosine from weight_decay to this over the run, as DINO; null: constant."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of a tower's block n of N is lr · layer_decay^(N - n): the deeper a layer lies, the less weights
    that were brought along are moved (BEiT, Bao et al. 2022). 1: all alike."""
    exclude_vectors: bool = True
    """Norms, biases and scalars are neither decayed nor, under lars, adapted. SwAV's own runs have false."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest joint gradient norm of trunk and objectives; null: no clipping."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> OptimizerRecipe:
        if self.nesterov and not self.momentum:
            raise ValueError("optimizer.nesterov needs optimizer.momentum above 0")
        return self


class ScheduleRecipe(Part):
    """Learning rate by step: linear warm-up, then half a cosine to `final`."""

    warmup_steps: int = Field(default=0, ge=0)
    warmup_start: float | None = Field(default=None, ge=0, le=1)
    """Share of the peak at step 0; the warm-up then is np.linspace(start, peak, warmup_steps), both ends included, as
    SwAV. null: peak/warmup_steps at step 0, as CLIP."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak reached at the last step."""


class CheckpointRecipe(Part):
    """When to save."""

    every: int = Field(default=1000, ge=1)
    """Steps between saves; the last step is always saved."""
    keep_last: int = Field(default=3, ge=1)
    """Newest whole checkpoints kept."""
    keep_every: int | None = Field(default=None, ge=1)
    """Steps that are multiples of this are kept for good."""


class LogRecipe(Part):
    """What is written while the run goes on."""

    every: int = Field(default=10, ge=1)
    """Steps between lines of log.jsonl."""
    signals_every: int = Field(default=100, ge=1)
    """Steps between RankMe and embedding spread of the global batch."""
    tensorboard: bool = True


class InitRecipe(Part):
    """Weights that a new run starts from; a resumed run has its own."""

    weights: Path
    """A weight file, a Hugging Face model folder, or a run of ours."""
    format: Literal["auto", "native", "open_clip", "hf", "timm", "swav", "dino"] = "auto"
    """auto: told by the names of the tensors. OpenAI's files are `open_clip`; `dino` is DINO and DINOv2."""
    of: Literal["model", "teacher", "ema"] = "model"
    """Of a run of ours, or of a DINO checkpoint with both: which weights."""


class EmaRecipe(Part):
    """A running average of the weights, kept beside them for evaluation and export; it trains nothing."""

    decay: float = Field(default=0.9999, ge=0, lt=1)
    """How much of the average stays at each step."""
    warmup: bool = True
    """min(decay, (1 + step) / (10 + step)): an average of the first steps forgets where it began."""
