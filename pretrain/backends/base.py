"""One interface for DDP, FSDP2 and ZeRO: what the training step needs of a sharding engine, and no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from pretrain.checkpoint import Checkpoint, Fragment
from pretrain.models.request import FeatureRequest, Input
from pretrain.models.trunk import Trunk
from pretrain.optim.schedule import Rates

Inputs = Mapping[FeatureRequest, Input]


class Backend(Protocol):
    """The trunk, its optimizer, and how gradients of all ranks become one."""

    @property
    def trunk(self) -> Trunk:
        """The bare trunk: names, buffers, statistics."""

    def micro_step(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of one micro-batch; gradients are reduced in the last one."""

    def forward(self, inputs: Inputs) -> dict[FeatureRequest, Tensor]:
        """Features in fp32, with the graph unless gradients are off or they are the momentum teacher's."""

    def backward(self, features: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Send the features' gradients (W x the local share) back through the trunk; those without a graph stay out."""

    def parameters(self) -> list[nn.Parameter]:
        """Local parameters that carry gradients after `backward`, for the joint norm."""

    def step(self, rates: Rates) -> None:
        """One optimizer step at `rates`, then gradients are cleared."""

    def update_teacher(self, momentum: float, step: int) -> None:
        """Bring the momentum teacher forward after 0-based `step`."""

    def update_ema(self, step: int) -> None:
        """Bring the running average forward after 0-based `step`, where the recipe keeps one."""

    def fragments(self) -> list[Fragment]:
        """What this rank writes of parameters, buffers and optimizer state."""

    def load(self, checkpoint: Checkpoint) -> None:
        """Take parameters, buffers and optimizer state from a checkpoint of any backend and world."""

    def describe(self) -> str:
        """Which engine truly runs, for the log and the tests."""
