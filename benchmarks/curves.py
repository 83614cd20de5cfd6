"""Loss curves of shipped recipes made small (`pretrain.certify.shrink`), on the certificate's own batches, with AdamW:
what `benchmarks.parity` and `benchmarks.resharding` compare.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch

from pretrain.certify.batch import global_batch
from pretrain.certify.shrink import ROWS, STEPS, shrink
from pretrain.distributed.process import Process
from pretrain.optim.schedule import rates_at
from pretrain.parts import Parts
from pretrain.reader import Batch
from pretrain.recipe import OptimizerRecipe, Recipe, ScheduleRecipe, load_recipe

ALONE = Process(0, 1, 0, torch.device("cpu"))


def small(name: str, *overrides: str) -> Recipe:
    """The shipped recipe made small, with AdamW at a constant rate of 1e-4: at 1e-3 untrained SwAV heads turn rounding
    into other assignments within 20 steps."""
    recipe, _ = shrink(load_recipe(name, list(overrides)))
    optimizer = OptimizerRecipe(lr=1e-4, weight_decay=0.1)
    return recipe.model_copy(update={"optimizer": optimizer, "schedule": ScheduleRecipe(final=1.0)})


def on(rank: int, world: int) -> Process:
    """This rank, on the CPU; torch's notes on names that its own calls have are left out."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    return Process(rank, world, rank, torch.device("cpu"))


def train(parts: Parts, recipe: Recipe, process: Process, steps: Iterable[int]) -> list[float]:
    """The loss of each of these 0-based steps, taken as training takes them from a fresh start."""
    losses: list[float] = []
    for step in steps:
        batch = _mine(parts, recipe, process, step)
        if process.world > 1 and not losses:
            parts.backend.warm_up(parts.two_stage.inputs(batch))
        losses.append(float(parts.step(batch, rates_at(step, STEPS, recipe)).loss))
    return losses


def difference(losses: Iterable[float], expected: Iterable[float]) -> float:
    """Largest relative difference of a loss (MoCo's first is 0: its queue is empty)."""
    return max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(losses, expected, strict=True))


def _mine(parts: Parts, recipe: Recipe, process: Process, step: int) -> Batch:
    rows = ROWS // process.world
    return global_batch(recipe, parts.joint, step).rows(process.rank * rows, (process.rank + 1) * rows)
