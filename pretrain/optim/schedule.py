"""Learning rate and weight decay as pure functions of the step."""

from __future__ import annotations

import math
from typing import NamedTuple

from pretrain.recipe import Recipe, ScheduleRecipe


class Rates(NamedTuple):
    """What an optimizer's step is told."""

    lr: float
    weight_decay: float


def rates_at(step: int, total_steps: int, recipe: Recipe) -> Rates:
    """The rates of 0-based `step` in a run of `total_steps`."""
    wanted = recipe.optimizer
    lr = lr_at(step, total_steps, wanted.lr, recipe.schedule)
    return Rates(lr, weight_decay_at(step, total_steps, wanted.weight_decay, wanted.weight_decay_final))


def lr_at(step: int, total_steps: int, peak: float, recipe: ScheduleRecipe) -> float:
    """Learning rate of 0-based `step`: the warm-up, then half a cosine to ``final·peak``.

    As open_clip's `cosine_lr` with ``warmup_start`` null and ``final`` 0, as SwAV's schedule with ``warmup_start``.
    """
    if step < recipe.warmup_steps:
        return peak * _warmup(step, recipe)
    progress = (step - recipe.warmup_steps) / max(1, total_steps - recipe.warmup_steps)
    return _half_cosine(peak, recipe.final * peak, progress)


def weight_decay_at(step: int, total_steps: int, start: float, final: float | None) -> float:
    """Weight decay of 0-based `step`: half a cosine from `start` to `final` over the whole run, as DINO's."""
    return start if final is None else _half_cosine(start, final, step / max(1, total_steps))


def _warmup(step: int, recipe: ScheduleRecipe) -> float:
    """Share of the peak."""
    if recipe.warmup_start is None:
        return (step + 1) / recipe.warmup_steps
    return recipe.warmup_start + (1 - recipe.warmup_start) * step / max(1, recipe.warmup_steps - 1)


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))
