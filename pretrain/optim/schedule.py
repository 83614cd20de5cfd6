"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from pretrain.recipe import ScheduleRecipe


def lr_at(step: int, total_steps: int, peak: float, recipe: ScheduleRecipe) -> float:
    """Learning rate of 0-based `step`: ``peak·(step+1)/warmup``, then half a cosine to ``final·peak``.

    As open_clip's `cosine_lr` (equal to it for ``final`` 0).
    """
    if step < recipe.warmup_steps:
        return peak * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, total_steps - recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (recipe.final + (1 - recipe.final) * cosine)
