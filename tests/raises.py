"""A plug-in objective that crashes: CLIP, whose loss raises on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.distributed.groups import Group
from pretrain.objectives.base import Features, Loss
from pretrain.objectives.clip import Clip

if TYPE_CHECKING:
    from pretrain.reader import Batch


class Raises(Clip):
    def loss(self, features: Features, batch: Batch, group: Group) -> Loss:
        raise RuntimeError("no loss today")


OBJECTIVE = Raises
