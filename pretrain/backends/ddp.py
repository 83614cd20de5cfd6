"""torch's DistributedDataParallel, resumable bit for bit; on one rank the bare trunk.

DDP re-orders its gradient buckets after the first backward, so the first step of a resumed process would sum in
another order than the same step of an uninterrupted one (seen from three ranks on). `warm_up` spends two throw-away
passes before the first real step. Buffer broadcast is off: it would overwrite what ranks hold for themselves.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.backends.base import Inputs
from pretrain.backends.state import load_optimizer, optimizer_tensors
from pretrain.checkpoint import Checkpoint, Fragment, slice_for_rank
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.models.momentum import MomentumCopy, ema_momentum
from pretrain.models.request import FeatureRequest
from pretrain.models.trunk import Trunk
from pretrain.objectives.functional.reduction import at_least_fp32
from pretrain.optim.build import build_optimizer, set_rates
from pretrain.optim.schedule import Rates
from pretrain.recipe import Recipe
from pretrain.weights.native import load_trunk
from pretrain.weights.which import Which

log = logging.getLogger(__name__)


class DDP:
    """See `pretrain.backends.base.Backend`."""

    def __init__(self, trunk: Trunk, recipe: Recipe, process: Process, *, teacher: bool = False) -> None:
        self.trunk = trunk.to(process.device)
        self.teacher = MomentumCopy(self.trunk) if teacher else None
        self.ema = MomentumCopy(self.trunk) if recipe.ema else None
        self._ema_recipe = recipe.ema
        self._process = process
        self._autocast_dtype = torch.bfloat16 if recipe.precision == "bf16" else None
        self._optimizer = build_optimizer(dict(trunk.named_parameters()), recipe.optimizer)
        self._wrapped: nn.Module = _wrap(self.trunk, process.device) if process.world > 1 else self.trunk

    def micro_step(self, last: bool) -> AbstractContextManager:
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return nullcontext()
        return self._wrapped.no_sync()

    def forward(self, inputs: Inputs) -> dict[FeatureRequest, Tensor]:
        with torch.autocast(self._process.device.type, self._autocast_dtype, enabled=self._autocast_dtype is not None):
            features: dict[FeatureRequest, Tensor] = {}
            for taught in (False, True):  # the teacher first would make no difference: nothing is shared
                asked = {r: x for r, x in inputs.items() if r.teacher == taught}
                if asked:
                    features |= self._module(taught)(asked)
        return {request: at_least_fp32(features[request]) for request in inputs}

    def _module(self, teacher: bool) -> nn.Module:
        if not teacher:
            return self._wrapped
        if self.teacher is None:
            raise UserError("an objective reads the momentum teacher, but none says how fast it follows")
        return self.teacher

    def backward(self, features: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        carrying = [(f, g) for f, g in zip(features, gradients) if f.requires_grad]
        torch.autograd.backward([f for f, _ in carrying], [g for _, g in carrying])

    def warm_up(self, inputs: Inputs) -> None:
        """Two passes with zero gradients; weights, BatchNorm statistics and generators are as before.

        Before them, parameters that no request reaches (a text tower, where no objective reads texts) are frozen:
        DDP would wait for their gradients for ever.
        """
        if self._process.world == 1:
            return
        inputs = {r: x for r, x in inputs.items() if not r.teacher}
        buffers = {name: b.clone() for name, b in self.trunk.named_buffers()}
        devices = [self._process.device] if self._process.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            self._freeze_unreached(inputs)
            for _ in range(2):
                features = list(self.forward(inputs).values())
                self.backward(features, [torch.zeros_like(f) for f in features])
                self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, b in self.trunk.named_buffers():
                b.copy_(buffers[name])

    def _freeze_unreached(self, inputs: Inputs) -> None:
        with self.micro_step(last=False):
            features = [f for f in self.forward(inputs).values() if f.requires_grad]
            zeros = [torch.zeros_like(f) for f in features]
            found = torch.autograd.grad(features, self.parameters(), zeros, allow_unused=True)
        unreached = [p for p, gradient in zip(self.parameters(), found) if gradient is None]
        if not unreached:
            return
        if self._process.first:
            log.warning(f"{len(unreached)} tensors of the trunk are not trained: no objective reaches them")
        for p in unreached:
            p.requires_grad_(False)
        self._wrapped = _wrap(self.trunk, self._process.device)

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.trunk.parameters() if p.requires_grad]

    def step(self, rates: Rates) -> None:
        set_rates(self._optimizer, rates)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def update_teacher(self, momentum: float, step: int) -> None:
        assert self.teacher is not None
        self.teacher.update(self.trunk, momentum, step)

    def update_ema(self, step: int) -> None:
        if self.ema is not None and self._ema_recipe is not None:
            self.ema.update(self.trunk, ema_momentum(self._ema_recipe, step), step)

    def _weights(self) -> dict[Which, Trunk]:
        """Every set of weights that is kept: the trained ones and their copies."""
        kept: dict[Which, Trunk] = {"model": self.trunk}
        if self.teacher is not None:
            kept["teacher"] = self.teacher.copy
        if self.ema is not None:
            kept["ema"] = self.ema.copy
        return kept

    def fragments(self) -> list[Fragment]:
        tensors = {f"{of}.{name}": t for of, trunk in self._weights().items() for name, t in trunk.state_dict().items()}
        tensors |= optimizer_tensors("optim", self._optimizer, dict(self.trunk.named_parameters()))
        return slice_for_rank(tensors, self._process.rank, self._process.world)

    def load(self, checkpoint: Checkpoint) -> None:
        for of, trunk in self._weights().items():
            load_trunk(trunk, checkpoint, of)
        load_optimizer("optim", self._optimizer, dict(self.trunk.named_parameters()), checkpoint)

    def describe(self) -> str:
        return f"{type(self._wrapped).__name__} on {self._process.world} x {self._process.device.type}"


def _wrap(trunk: nn.Module, device: torch.device) -> DistributedDataParallel:
    with warnings.catch_warnings():
        # newer torch renames the option, older knows only this name
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        return DistributedDataParallel(
            trunk,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
