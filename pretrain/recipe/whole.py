"""A run as one typed value, checked as a whole before anything starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pretrain.backend_names import BackendName
from pretrain.recipe.base import Part
from pretrain.recipe.data import DataRecipe
from pretrain.recipe.model import ModelRecipe
from pretrain.recipe.run import (
    CheckpointRecipe,
    ComputeRecipe,
    EmaRecipe,
    EvaluateRecipe,
    FaultsRecipe,
    InitRecipe,
    LogRecipe,
    OptimizerRecipe,
    ScheduleRecipe,
    ShardingRecipe,
)


def _bare_weights(value: Any) -> Any:
    return {"weights": value} if isinstance(value, str | Path) else value


class Recipe(Part):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output: Path
    """Run folder: recipe, log, checkpoints. The same folder resumes."""
    world: int | None = Field(default=None, ge=1)
    """Ranks this recipe needs; another number is refused. `python -m pretrain` alone starts that many here."""
    backend: Literal["auto", BackendName] = "auto"
    """What is spread over the ranks. ddp: nothing; zero1: optimizer state; zero2: gradients too; zero3 and fsdp2:
    weights too. Any can go on from another's checkpoint. auto: what an accelerate config asks for, else ddp."""
    sharding: ShardingRecipe = ShardingRecipe()
    seed: int = Field(default=0, ge=0)
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps in all. Either this or `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Converted to ceil(epochs · samples / global_batch) steps."""
    global_batch: int = Field(ge=1)
    """Samples an optimizer step, over all ranks and micro-steps."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-steps a step. Exact, since features are cached and the loss sees the whole batch; but with BatchNorm in a
    tower, whose statistics are then of a micro-batch, it is another training."""
    local_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Samples a rank takes at once, in place of `accumulation`; auto: the most that the estimate of memory allows.
    null: global_batch / (world · accumulation)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """bf16, fp16: autocast of the towers, fp16 with a loss scale; weights, losses and reductions stay fp32. auto: what
    an accelerate config asks for, else fp32."""
    compute: ComputeRecipe = ComputeRecipe()
    deterministic: bool = True
    """Only algorithms that give the same bits each time."""
    data: DataRecipe
    model: ModelRecipe = ModelRecipe()
    objectives: dict[str, float | dict[str, Any]] = Field(default={"clip": 1.0}, min_length=1)
    """Objective -> its weight, or a mapping of `weight` and its own options."""
    init: Annotated[InitRecipe, BeforeValidator(_bare_weights)] | None = None
    """First weights: a path, or `{weights, format, of}`; null: drawn from the seed."""
    ema: EmaRecipe | None = None
    """null: no average is kept."""
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    log: LogRecipe = LogRecipe()
    faults: FaultsRecipe = FaultsRecipe()
    evaluate: EvaluateRecipe | None = None
    """null: no evaluation during training."""

    @model_validator(mode="after")
    def _as_a_whole(self) -> Recipe:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.world:
            check_split(self.global_batch, self.world, self.accumulation)
        if self.evaluate and self.evaluate.weights == "ema" and self.ema is None:
            raise ValueError("evaluate.weights: ema, but no average is kept: set ema: {}, or evaluate.weights: model")
        return self

    def total_steps(self, samples: int) -> int:
        """Optimizer steps of this run over `samples` samples an epoch."""
        return self.steps or math.ceil(self.epochs * samples / self.global_batch)  # type: ignore[operator]


def check_split(global_batch: int, world: int, accumulation: int) -> None:
    """ValueError with the nearest batches that work, unless the batch divides into equal micro-batches."""
    unit = world * accumulation
    if global_batch % unit:
        below, above = global_batch // unit * unit, -(-global_batch // unit) * unit
        near = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"global_batch {global_batch} must be a multiple of world {world} x accumulation {accumulation}; try {near}"
        )
