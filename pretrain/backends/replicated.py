"""Objectives' own parameters: whole on every rank, fp32, reduced by us, in a plain torch optimizer.

They stay outside the sharded trunk, so that a temperature or a prototype can be edited between steps under any
backend, and so that state of the objectives has one place in the checkpoint.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.backends.gradients import drop, scale, squared_norm
from pretrain.backends.state import load_optimizer, optimizer_tensors
from pretrain.checkpoint import Checkpoint, Fragment, slice_for_rank
from pretrain.distributed.process import Process
from pretrain.objectives.joint import Joint
from pretrain.objectives.pieces.sharded import Sharded
from pretrain.optim.build import build_optimizer, set_rates
from pretrain.optim.schedule import Rates
from pretrain.recipe import OptimizerRecipe


class Replicated:
    """The joint objective's parameters and buffers, and their optimizer."""

    def __init__(self, joint: Joint, recipe: OptimizerRecipe, process: Process) -> None:
        self._module = joint.members.to(process.device)
        self._process = process
        self._optimizer = build_optimizer(dict(self._module.named_parameters()), recipe) if self.parameters() else None

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self._module.parameters() if p.requires_grad]

    def squared_norm(self) -> Tensor:
        """Scalar in float64: sum of squares of the gradients."""
        return squared_norm(self.parameters(), self._process.device)

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply all gradients by a scalar, before the step."""
        scale(self.parameters(), factor)

    def drop_gradients(self) -> None:
        """Clear the gradients: this step is not taken."""
        drop(self.parameters())

    def gradients(self) -> dict[str, Tensor]:
        """Every parameter's mean gradient, between `reduce` and `step`, by name in the checkpoint's way."""
        named = self._module.named_parameters()
        return {f"objective.{n}": p.grad.detach().cpu().clone() for n, p in named if p.grad is not None}

    def reduce(self, loss: Tensor) -> Tensor:
        """Mean of the gradients over the ranks, in one flat collective; it takes `loss` along, whose mean is returned.

        A loss that is not finite on one rank alone is so on all of them from here on.
        """
        parameters = self.parameters()
        # a parameter that was not used still takes part: collectives run on all ranks, and one rank is no exception
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self._process.world == 1:
            return loss
        gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
        flat = torch.cat([*gradients, loss.float().reshape(1)])
        dist.all_reduce(flat)
        flat /= self._process.world
        *pieces, mean = flat.split([*(p.numel() for p in parameters), 1])
        for p, piece in zip(parameters, pieces):
            p.grad = piece.view_as(p)
        return mean.squeeze(0)

    def step(self, rates: Rates) -> None:
        """One optimizer step at `rates`, then gradients are cleared."""
        if self._optimizer is not None:
            set_rates(self._optimizer, rates)
            self._optimizer.step()
        self.drop_gradients()

    def fragments(self) -> list[Fragment]:
        tensors = {f"objective.{name}": t for name, t in self._module.state_dict().items()}
        if self._optimizer is not None:
            named = dict(self._module.named_parameters())
            tensors |= optimizer_tensors("objective_optim", self._optimizer, named)
        own = [
            Fragment(name, module.shape, part.dtype, offset, part)
            for name, module in self._sharded()
            for offset, part in module.parts()
        ]
        return slice_for_rank(tensors, self._process.rank, self._process.world) + own

    def load(self, checkpoint: Checkpoint) -> None:
        self._module.load_state_dict({n: checkpoint.read(f"objective.{n}") for n in self._module.state_dict()})
        if self._optimizer is not None:
            load_optimizer("objective_optim", self._optimizer, dict(self._module.named_parameters()), checkpoint)
        for name, module in self._sharded():
            for offset, part in module.parts():
                part.copy_(checkpoint.read_range(name, offset, offset + part.numel()))

    def _sharded(self) -> list[tuple[str, Sharded]]:
        """State of which this rank holds a part, under the names of tensors in the checkpoint."""
        modules = self._module.named_modules()
        return [(f"objective.{n}.held", m) for n, m in modules if isinstance(m, Sharded) and not m.whole]
