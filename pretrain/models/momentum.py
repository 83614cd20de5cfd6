"""A copy of a module that follows it slowly and takes no gradient: a momentum teacher (He et al. 2020, MoCo, §3.2), or
a running average of the weights (Polyak & Juditsky 1992, with exponential weights).

It runs in evaluation mode, and BatchNorm's running statistics follow the student's as the weights do (Cai et al.
2021, EMAN). So a teacher's row depends on that row alone: there is no leak through batch statistics that MoCo's
shuffling had to stop, and its features are the same at any world size and accumulation.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from pretrain.distributed.shards import local
from pretrain.recipe import EmaRecipe

FOLLOW = 10
"""Statistics follow at least as fast as a mean over the last steps / FOLLOW + 1: they begin at (0, 1), far off."""


class MomentumCopy(nn.Module):
    """`module` at its present weights, then `update` by `update` behind it; calls go to the copy, without a graph."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.copy: Any = copy.deepcopy(module).requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.copy(*args, **kwargs)

    def train(self, mode: bool = True) -> MomentumCopy:
        """Stays in evaluation mode whatever is asked of the module around it."""
        return super().train(False)

    @torch.no_grad()
    def update(self, module: nn.Module, momentum: float, step: int) -> None:
        """copy <- momentum · copy + (1 - momentum) · module, after 0-based `step`; counters are copied."""
        own = [local(p) for p in self.copy.parameters()]  # a sharded copy lies as what it follows
        theirs = [local(p).to(o.dtype) for o, p in zip(own, module.parameters())]
        torch._foreach_lerp_(own, theirs, 1.0 - momentum)
        statistics = min(momentum, (step + 1) / (step + 1 + FOLLOW))
        buffers = list(zip(self.copy.buffers(), module.buffers()))
        moved = [(mine, its.to(mine.dtype)) for mine, its in buffers if mine.is_floating_point()]
        if moved:
            torch._foreach_lerp_([mine for mine, _ in moved], [its for _, its in moved], 1.0 - statistics)
        for mine, its in buffers:
            if not mine.is_floating_point():
                mine.copy_(its)


def ema_momentum(recipe: EmaRecipe, step: int) -> float:
    """How much of the average stays after 0-based `step`.

    With warm-up min(decay, (1 + step) / (10 + step)), the rule of TensorFlow's ExponentialMovingAverage(num_updates):
    0.1 at first, 0.5 after 8 steps, 0.99 after 890: the average is of about the last tenth of the steps done.
    """
    return min(recipe.decay, (1 + step) / (10 + step)) if recipe.warmup else recipe.decay
