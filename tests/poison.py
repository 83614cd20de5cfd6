"""A plug-in objective that breaks: CLIP, whose loss is NaN on the rank that holds a certain sample."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pretrain.distributed.groups import Group
from pretrain.objectives.base import Features, Loss
from pretrain.objectives.clip import Clip, ClipOptions

if TYPE_CHECKING:
    from pretrain.reader import Batch


class PoisonOptions(ClipOptions):
    sample: int
    """Place of the sample in its source."""
    epoch: int | None = 0
    """null: every one."""
    alone: bool = False
    """Only the loss, on that rank, is NaN; no gradient is."""
    while_there: Path | None = None
    """Only as long as there is such a file."""


class Poison(Clip):
    Options = PoisonOptions
    options: PoisonOptions

    def loss(self, features: Features, batch: Batch, group: Group) -> Loss:
        loss = super().loss(features, batch, group)
        bad = batch.ids == self.options.sample
        if self.options.epoch is not None:
            bad &= batch.epoch == self.options.epoch
        if self.options.while_there is not None:
            bad &= self.options.while_there.exists()
        nan = torch.where(bad.any(), torch.nan, 1.0)
        loss.value = loss.value + (nan - 1.0) if self.options.alone else loss.value * nan
        return loss


OBJECTIVE = Poison
