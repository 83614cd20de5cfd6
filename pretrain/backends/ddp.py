"""torch's DistributedDataParallel, resumable bit for bit; on one rank the bare trunk.

DDP re-orders its gradient buckets after the first backward, so the first step of a resumed process would sum in
another order than the same step of an uninterrupted one (seen from three ranks on). `warm_up` spends two throw-away
passes before the first real step. Buffer broadcast is off: it would overwrite what ranks hold for themselves.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.backends.base import Backend, Inputs
from pretrain.backends.gradients import drop, scale, squared_norm
from pretrain.backends.state import load_optimizer, optimizer_tensors
from pretrain.checkpoint import Checkpoint, Fragment, slice_for_rank
from pretrain.distributed.process import Process
from pretrain.models.trunk import Trunk
from pretrain.optim.build import build_optimizer, set_rates
from pretrain.optim.schedule import Rates
from pretrain.recipe import Recipe
from pretrain.weights.native import load_trunk


class DDP(Backend):
    """See `pretrain.backends.base.Backend`."""

    def __init__(self, trunk: Trunk, recipe: Recipe, process: Process, *, teacher: bool = False) -> None:
        super().__init__(trunk.to(process.device), recipe, process, teacher=teacher)
        self._optimizer = build_optimizer(dict(trunk.named_parameters()), recipe.optimizer)
        self._wrapped: nn.Module = _wrap(self.trunk, process.device) if process.world > 1 else self.trunk

    @property
    def wrapped(self) -> nn.Module:
        return self._wrapped

    def micro_step(self, last: bool) -> AbstractContextManager:
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return nullcontext()
        return self._wrapped.no_sync()

    def warm_up(self, inputs: Inputs) -> None:
        """Two passes with zero gradients; weights, BatchNorm statistics and generators are as before."""
        if self.process.world == 1:
            return
        inputs = {r: x for r, x in inputs.items() if not r.teacher}
        buffers = {name: b.clone() for name, b in self.trunk.named_buffers()}
        devices = [self.process.device] if self.process.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            for _ in range(2):
                features = list(self.forward(inputs).values())
                self.backward(features, [torch.zeros_like(f) for f in features])
                self.drop_gradients()
        with torch.no_grad():
            for name, b in self.trunk.named_buffers():
                b.copy_(buffers[name])

    def squared_norm(self) -> Tensor:
        return squared_norm(self.trunk.parameters(), self.process.device)

    def scale_gradients(self, factor: Tensor) -> None:
        scale(self.trunk.parameters(), factor)

    def step(self, rates: Rates) -> None:
        set_rates(self._optimizer, rates)
        self._optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        drop(self.trunk.parameters())

    def gradients(self) -> dict[str, Tensor]:
        return {n: p.grad.detach().cpu().clone() for n, p in self.trunk.named_parameters() if p.grad is not None}

    def fragments(self) -> list[Fragment]:
        tensors = {f"{of}.{name}": t for of, trunk in self.weights().items() for name, t in trunk.state_dict().items()}
        tensors |= optimizer_tensors("optim", self._optimizer, dict(self.trunk.named_parameters()))
        return slice_for_rank(tensors, self.process.rank, self.process.world)

    def load(self, checkpoint: Checkpoint) -> None:
        for of, trunk in self.weights().items():
            load_trunk(trunk, checkpoint, of)
        load_optimizer("optim", self._optimizer, dict(self.trunk.named_parameters()), checkpoint)

    def describe(self) -> str:
        name = "PyTorch" if self._wrapped is self.trunk else type(self._wrapped).__name__
        return f"{name} on {self.process.world} x {self.process.device.type}"


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
