"""The factor that keeps fp16 gradients from vanishing (Micikevicius et al. 2018, §3.2), with torch's GradScaler's rule:
half of it after a step that overflowed, twice of it after 2,000 that did not.

torch's own is bound to an optimizer's step and looks at each rank's gradients; here the step is left out where the
norm of the reduced gradient is not finite, which is one number on all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.checkpoint import Checkpoint, Fragment, slice_for_rank
from pretrain.distributed.process import Process

START, GROWTH_STEPS = 65536.0, 2000


class LossScale:
    """`value` multiplies the gradients that go into the towers; 1 and constant unless `enabled`."""

    def __init__(self, process: Process, *, enabled: bool) -> None:
        self.enabled, self.value = enabled, START if enabled else 1.0
        self._since, self._process = 0, process

    def taken(self) -> None:
        """A step went well."""
        self._since += 1
        if self.enabled and self._since >= GROWTH_STEPS:
            self.value, self._since = 2 * self.value, 0

    def overflowed(self) -> bool:
        """A gradient is not finite: whether that may be the scale's doing, which then is lower from here on."""
        if not self.enabled or self.value <= 1.0:
            return False
        self.value, self._since = self.value / 2, 0
        return True

    def fragments(self) -> list[Fragment]:
        state = {"loss_scale": torch.tensor([self.value, float(self._since)], dtype=torch.float64)}
        return slice_for_rank(state, self._process.rank, self._process.world) if self.enabled else []

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; one of another precision has none, and it starts anew."""
        if self.enabled and "loss_scale" in checkpoint.names():
            state: Tensor = checkpoint.read("loss_scale")
            self.value, self._since = state[0].item(), int(state[1])
