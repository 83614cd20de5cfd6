"""CLIP that one sample makes NaN,: a plug-in, `objectives: {benchmarks.faults.poison: {sample: 17, …}}`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pretrain.distributed.groups import Group
from pretrain.objectives.base import Features, Loss
from pretrain.objectives.clip import Clip, ClipOptions

if TYPE_CHECKING:
    from pretrain.reader import Batch


class PoisonedOptions(ClipOptions):
    """Which sample, and how long."""

    sample: int
    """Place in the source's line."""
    while_there: Path
    """The sample does harm as long as there is such a file."""


class Poisoned(Clip):
    """NaN on the rank that holds the sample; the others learn of it from the gradient."""

    Options = PoisonedOptions  # type: ignore[assignment]
    options: PoisonedOptions

    def loss(self, features: Features, batch: Batch, group: Group) -> Loss:
        loss = super().loss(features, batch, group)
        if torch.any(batch.ids == self.options.sample) and self.options.while_there.exists():
            loss.value = loss.value * torch.nan
        return loss


OBJECTIVE = Poisoned
