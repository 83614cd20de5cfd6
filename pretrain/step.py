"""Forward and backward of one global batch: features once, the loss on them, their gradients back.

With `accumulation` k > 1 the features of all micro-batches are computed without a graph, the loss sees the whole
batch, and every micro-batch is run again with its random numbers restored to take its part of the gradient back
(GradCache, Gao et al. 2021). Exact for any k, the temperature included, but for batch-coupled normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pretrain.backends.base import Backend, Inputs
from pretrain.backends.replicated import Replicated
from pretrain.distributed.groups import Group
from pretrain.distributed.syncbn import frozen_statistics
from pretrain.models.lock import is_trained, locked_input
from pretrain.models.request import FeatureRequest, Input, PooledInput, RegionInput
from pretrain.objectives.base import Features
from pretrain.objectives.joint import Joint
from pretrain.optim.schedule import Rates
from pretrain.philox import key
from pretrain.reader import Batch


@dataclass
class StepResult:
    """What one forward and backward gave."""

    loss: Tensor
    """Scalar, global mean, on the device."""
    figures: dict[str, Tensor | float]
    """Losses and signals by objective."""
    features: Features
    """This rank's features, detached."""


class TwoStage:
    """The step's forward and backward, bound to a backend and a joint objective."""

    def __init__(
        self, backend: Backend, joint: Joint, *, accumulation: int, seed: int, rank: int, group: Group
    ) -> None:
        self.backend, self.joint = backend, joint
        self.accumulation, self.seed, self.rank, self.group = accumulation, seed, rank, group
        self.requests = joint.requests()
        self.region_views = {view.name: view for view in joint.region_views()}

    def __call__(self, batch: Batch) -> StepResult:
        """Gradients of the global mean loss into the backend's and the objectives' parameters."""
        taught, known = self._taught, self._locked_inputs
        if self.accumulation == 1:
            features = self.features(batch, 0)
            leaves = _leaves(features, taught)
            loss, figures = self._score(leaves, batch)
            self._send_back(features, {r: leaves[r].grad for r in taught})
            return StepResult(loss, figures, _detached(leaves))
        micro = self._micro_batches(batch)
        with torch.no_grad():
            cached = [self.features(m, i, [*self.requests, *known.values()]) for i, m in enumerate(micro)]
        leaves = _leaves({r: torch.cat([c[r] for c in cached]) for r in self.requests}, taught)
        loss, figures = self._score(leaves, batch)
        for i, (m, features) in enumerate(zip(micro, cached)):
            again = {r: PooledInput(features[known[r]]) if r in known else self._input(r, m) for r in taught}
            self._second_pass(i, m, again, leaves)
        return StepResult(loss, figures, _detached(leaves))

    @cached_property  # once a run: what is trained is settled before the first step
    def _taught(self) -> list[FeatureRequest]:
        """Requests whose features take a gradient."""
        return [r for r in self.requests if is_trained(self.backend.trunk, r)]

    @cached_property
    def _locked_inputs(self) -> dict[FeatureRequest, FeatureRequest]:
        """Those that a trained projection makes of a locked backbone's pooled feature, and that feature."""
        return {r: pooled for r in self._taught if (pooled := locked_input(self.backend.trunk, r))}

    def inputs(self, batch: Batch, requests: Sequence[FeatureRequest] | None = None) -> Inputs:
        """What the trunk reads for every request."""
        return {r: self._input(r, batch) for r in requests or self.requests}

    def _input(self, request: FeatureRequest, batch: Batch) -> Input:
        if request.output == "regions":
            of = self.region_views[request.view].of
            return RegionInput(batch.regions[request.view], of, batch.images[of])
        return (batch.images if request.tower == "image" else batch.tokens)[request.view]

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        size = len(batch.weight) // self.accumulation
        return [batch.rows(i * size, (i + 1) * size) for i in range(self.accumulation)]

    def features(self, batch: Batch, micro: int, requests: Sequence[FeatureRequest] | None = None) -> Features:
        """Features of one micro-batch, with the random draws that are its own."""
        seed_draws(self.seed, batch.step, self.rank, micro)
        return self.backend.forward(self.inputs(batch, requests))

    def _score(self, leaves: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss, figures = self.joint.loss(leaves, batch, self.group)
        loss.backward()
        return loss.detach(), figures

    def _second_pass(self, i: int, micro: Batch, inputs: Inputs, leaves: Features) -> None:
        """Run micro-batch `i` again, with its draws and a graph, and send its part of the gradients back."""
        rows = slice(i * len(micro), (i + 1) * len(micro))
        gradients = {r: None if (g := leaves[r].grad) is None else g[rows] for r in inputs}
        last = i == self.accumulation - 1
        with self.backend.micro_step(last=last), frozen_statistics(self.backend.trunk):
            seed_draws(self.seed, micro.step, self.rank, i)
            self._send_back(self.backend.forward(inputs), gradients)

    def _send_back(self, features: Features, gradients: dict[FeatureRequest, Tensor | None]) -> None:
        # a feature the loss did not use (an absent field) still goes back, as zeros: DDP waits for all of them
        pairs = [(features[r], torch.zeros_like(features[r]) if g is None else g) for r, g in gradients.items()]
        self.backend.backward([f for f, _ in pairs], [g for _, g in pairs])


def seed_draws(seed: int, step: int, rank: int, micro: int) -> None:
    """Random numbers of the towers (dropout) from here on: those of one micro-step of one rank."""
    torch.manual_seed(key(seed, "dropout", step, rank, micro) >> 1)


def update(
    backend: Backend,
    replicated: Replicated,
    joint: Joint,
    result: StepResult,
    *,
    step: int,
    rates: Rates,
    clip_norm: float | None,
) -> Tensor:
    """Reduce, clip and step; the joint gradient norm of trunk and objectives before clipping.

    Raises:
        NonFiniteError: loss or gradient is not finite. The norm is of the reduced gradient, so all ranks see the
            same and none has stepped.
    """
    replicated.reduce()
    norm = (backend.squared_norm() + replicated.squared_norm()).sqrt()
    if not torch.isfinite(norm + result.loss):
        raise NonFiniteError(result.loss.item(), norm.item())
    if clip_norm is not None:
        factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        backend.scale_gradients(factor)
        replicated.scale_gradients(factor)
    momentum = joint.teacher_momentum(step)
    backend.step(rates)
    replicated.step(rates)
    if momentum is not None:
        backend.update_teacher(momentum, step)
    backend.update_ema(step)
    joint.after_step(step)
    return norm


class NonFiniteError(Exception):
    """Loss or gradient of a step is NaN or infinite; nothing was updated."""

    def __init__(self, loss: float, norm: float) -> None:
        super().__init__(f"loss {loss:.4g}, gradient norm {norm:.4g}")


def _leaves(features: Features, taught: Sequence[FeatureRequest]) -> Features:
    return {r: f.detach().requires_grad_(r in taught) for r, f in features.items()}


def _detached(features: Features) -> Features:
    return {r: f.detach() for r, f in features.items()}
