"""A plug-in objective that breaks: CLIP, whose loss is NaN on the rank that holds a certain sample."""

from __future__ import annotations

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
    epoch: int = 0


class Poison(Clip):
    Options = PoisonOptions
    options: PoisonOptions

    def loss(self, features: Features, batch: Batch, group: Group) -> Loss:
        loss = super().loss(features, batch, group)
        bad = ((batch.ids == self.options.sample) & (batch.epoch == self.options.epoch)).any()
        loss.value = loss.value * torch.where(bad, torch.nan, 1.0)
        return loss


OBJECTIVE = Poison
