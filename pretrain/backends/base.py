"""One interface for DDP, FSDP2 and ZeRO: what the training step needs of a sharding engine, and no more.

What all engines have alike is here: the copies that follow the trunk, autocast, the way of features and gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from pretrain.checkpoint import Checkpoint, Fragment
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.models.compute import AUTOCAST
from pretrain.models.momentum import MomentumCopy, ema_momentum
from pretrain.models.request import FeatureRequest, Input
from pretrain.models.trunk import Trunk
from pretrain.objectives.functional.reduction import at_least_fp32
from pretrain.optim.schedule import Rates
from pretrain.recipe import Recipe
from pretrain.weights.which import Which

Inputs = Mapping[FeatureRequest, Input]


class Backend(ABC):
    """The trunk, its optimizer, and how gradients of all ranks become one.

    Every method is called by all ranks together. `trunk` is what was given, wherever its parameters lie now; `teacher`
    and `ema` are copies that lie as the trunk does. A backend that spreads weights takes them over where they were
    built, in host memory, so that the device never holds them all whole.
    """

    def __init__(self, trunk: Trunk, recipe: Recipe, process: Process, *, teacher: bool = False) -> None:
        self.trunk = trunk
        self.teacher = MomentumCopy(self.trunk) if teacher else None
        self.ema = MomentumCopy(self.trunk) if recipe.ema else None
        self.process, self.recipe = process, recipe
        self._autocast = AUTOCAST[recipe.precision]

    # ---- features and gradients

    def forward(self, inputs: Inputs, of: Which = "model") -> dict[FeatureRequest, Tensor]:
        """Features in fp32: of the momentum teacher where a request says so, of these weights else; with the graph
        unless gradients are off or they are a copy's."""
        with self.autocast():
            features: dict[FeatureRequest, Tensor] = {}
            for taught in (False, True):
                asked = {r: x for r, x in inputs.items() if r.teacher == taught}
                if asked:
                    features |= self._module("teacher" if taught else of)(asked)
        return {request: at_least_fp32(features[request]) for request in inputs}

    def autocast(self) -> AbstractContextManager:
        """What the towers compute in, of the trunk and of its copies."""
        return torch.autocast(self.process.device.type, self._autocast, enabled=self._autocast is not None)

    @property
    @abstractmethod
    def wrapped(self) -> nn.Module:
        """What is called in place of the trunk."""

    @abstractmethod
    def micro_step(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of one micro-batch; gradients are reduced in the last one."""

    def backward(self, features: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Send the features' gradients (W x the local share) back through the trunk; those without a graph stay out."""
        carrying = [(f, g) for f, g in zip(features, gradients) if f.requires_grad]
        torch.autograd.backward([f for f, _ in carrying], [g for _, g in carrying])

    def warm_up(self, inputs: Inputs) -> None:  # noqa: B027  nothing, for most
        """Before the first step, with a micro-batch: what must have run once for later steps to be alike."""

    # ---- the step

    @abstractmethod
    def squared_norm(self) -> Tensor:
        """Scalar in float64: sum of squares of the mean gradient, over all ranks' pieces; the same on every rank."""

    @abstractmethod
    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply all gradients by a scalar, before the step."""

    @abstractmethod
    def step(self, rates: Rates) -> None:
        """One optimizer step at `rates`, then gradients are cleared."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Clear the gradients: this step is not taken."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Every trained parameter's mean gradient, whole, on the CPU of every rank, between backward and step.

        For certificates and tests: it gathers all of them.
        """

    def update_teacher(self, momentum: float, step: int) -> None:
        """Bring the momentum teacher forward after 0-based `step`."""
        assert self.teacher is not None
        self.teacher.update(self.trunk, momentum, step)

    def update_ema(self, step: int) -> None:
        """Bring the running average forward after 0-based `step`, where the recipe keeps one."""
        if self.ema is not None and self.recipe.ema is not None:
            self.ema.update(self.trunk, ema_momentum(self.recipe.ema, step), step)

    # ---- the checkpoint

    @abstractmethod
    def fragments(self) -> list[Fragment]:
        """What this rank writes of parameters, buffers and optimizer state: names and values do not depend on the
        backend or the world, only who writes which part."""

    @abstractmethod
    def load(self, checkpoint: Checkpoint) -> None:
        """Take parameters, buffers and optimizer state from a checkpoint of any backend and world."""

    @abstractmethod
    def describe(self) -> str:
        """Which engine truly runs, for the log and the tests: told by the types and settings that are there."""

    def weights(self) -> dict[Which, Trunk]:
        """Every set of weights that is kept: the trained ones and their copies."""
        kept: dict[Which, Trunk] = {"model": self.trunk}
        if self.teacher is not None:
            kept["teacher"] = self.teacher.copy
        if self.ema is not None:
            kept["ema"] = self.ema.copy
        return kept

    def _module(self, of: Which) -> nn.Module:
        if of == "model":
            return self.wrapped
        copy = self.teacher if of == "teacher" else self.ema
        if copy is None and of == "teacher":
            raise UserError("an objective reads the momentum teacher, but none says how fast it follows")
        assert copy is not None
        return copy
