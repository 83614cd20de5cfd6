"""Forward and backward of one global batch: features once, the loss on them, their gradients back.

With `accumulation` k > 1 the features of all micro-batches are computed without a graph, the loss sees the whole
batch, and every micro-batch is run again with its random numbers restored to take its part of the gradient back
(GradCache, Gao et al. 2021). Exact for any k, the temperature included, but for batch-coupled normalisation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from pretrain.backends.base import Backend, Inputs
from pretrain.backends.replicated import Replicated
from pretrain.distributed.groups import Group
from pretrain.distributed.syncbn import frozen_statistics
from pretrain.models.lock import is_trained, locked_input
from pretrain.models.request import FeatureRequest, Input, PooledInput, RegionInput
from pretrain.objectives.base import Features
from pretrain.objectives.joint import Joint
from pretrain.optim.loss_scale import LossScale
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
    grad_norm: Tensor | None = None
    """Joint norm of trunk and objectives before clipping, once the step is taken; None: it was left out."""
    overflowed: bool = False
    """It was left out because fp16's scale was too high, and is lower now."""


class TwoStage:
    """The step's forward and backward, bound to a backend and a joint objective.

    The trunk's gradients come out times `scale`. `mark` is told of every phase as it begins.
    """

    scale: float = 1.0
    mark: Callable[[str], None] = staticmethod(lambda phase: None)

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
        self.mark("forward")
        if self.accumulation == 1:
            features = self.features(batch, 0)
            leaves = _leaves(features, taught)
            loss, figures = self._score(leaves, batch)
            self.mark("backward")
            self._send_back(features, {r: leaves[r].grad for r in taught})
            return StepResult(loss, figures, _detached(leaves))
        micro = self._micro_batches(batch)
        with torch.no_grad():
            cached = [self.features(m, i, [*self.requests, *known.values()]) for i, m in enumerate(micro)]
        leaves = _leaves({r: torch.cat([c[r] for c in cached]) for r in self.requests}, taught)
        loss, figures = self._score(leaves, batch)
        self.mark("backward")
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
        self.mark("loss")
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
        scaled = [g if self.scale == 1.0 else g * self.scale for _, g in pairs]
        self.backend.backward([f for f, _ in pairs], scaled)


def seed_draws(seed: int, step: int, rank: int, micro: int) -> None:
    """Random numbers of the towers (dropout) from here on: those of one micro-step of one rank."""
    torch.manual_seed(key(seed, "dropout", step, rank, micro) >> 1)


class Step:
    """A step from batch to new weights: what training and replay do alike.

    A step whose loss or gradient is not finite raises, or with `skip` is left out: weights, optimizer, teacher and all
    that trunk and objectives remember are as before. So is one whose fp16 gradients overflow, at a lower scale then.
    """

    def __init__(
        self,
        two_stage: TwoStage,
        replicated: Replicated,
        loss_scale: LossScale,
        *,
        clip_norm: float | None = None,
        skip: bool = False,
    ) -> None:
        self.two_stage, self.replicated, self.loss_scale = two_stage, replicated, loss_scale
        self.clip_norm, self.skip = clip_norm, skip
        left_out = skip or loss_scale.enabled
        self._remembered = Remembered(two_stage.backend.trunk, two_stage.joint) if left_out else None

    def __call__(self, batch: Batch, rates: Rates) -> StepResult:
        """Forward, backward and update.

        Raises:
            NonFiniteError: loss or gradient is not finite and the step is not to be left out.
        """
        backend, joint = self.two_stage.backend, self.two_stage.joint
        if self._remembered is not None:
            self._remembered.keep()
        joint.before_step(batch.step)
        self.two_stage.scale = self.loss_scale.value
        result = self.two_stage(batch)
        self.two_stage.mark("step")
        try:
            result.grad_norm = update(
                backend, self.replicated, joint, result,
                step=batch.step, rates=rates, clip_norm=self.clip_norm, scale=self.two_stage.scale,
            )  # fmt: skip
            self.loss_scale.taken()
        except NonFiniteError as error:
            result.overflowed = error.may_overflow and self.loss_scale.overflowed()
            if not result.overflowed and not self.skip:
                raise
            self._leave_out()
        return result

    def _leave_out(self) -> None:
        assert self._remembered is not None
        self.two_stage.backend.drop_gradients()
        self.replicated.drop_gradients()
        self._remembered.restore()


class Remembered:
    """What a step changes before its gradients are known, kept to be put back: BatchNorm's statistics, queues, centres,
    prototypes that are brought back to unit length."""

    def __init__(self, trunk: nn.Module, joint: nn.Module) -> None:
        self._trunk, self._joint = trunk, joint
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def keep(self) -> None:
        changing = self._changing()
        if not self._kept:
            self._kept = [torch.empty_like(t) for t in changing]
        for kept, t in zip(self._kept, changing):
            kept.copy_(t)

    @torch.no_grad()
    def restore(self) -> None:
        for kept, t in zip(self._kept, self._changing()):
            t.copy_(kept)

    def _changing(self) -> list[Tensor]:
        return [*self._trunk.buffers(), *self._joint.buffers(), *self._joint.parameters()]


def update(
    backend: Backend,
    replicated: Replicated,
    joint: Joint,
    result: StepResult,
    *,
    step: int,
    rates: Rates,
    clip_norm: float | None,
    scale: float = 1.0,
) -> Tensor:
    """Reduce, clip and step; the joint gradient norm of trunk and objectives before clipping.

    scale: of the trunk's gradients (fp16).

    Raises:
        NonFiniteError: loss or gradient is not finite. Both are over all ranks, so all see the same and none has
            stepped.
    """
    loss = replicated.reduce(result.loss)  # an objective's may be a rank's own
    norm = (backend.squared_norm() / scale**2 + replicated.squared_norm()).sqrt()
    if not torch.isfinite(norm + loss):
        own = torch.isfinite(replicated.squared_norm() + loss).item()
        raise NonFiniteError(loss.item(), norm.item(), may_overflow=bool(own))
    factor = torch.ones_like(norm) if clip_norm is None else (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    if clip_norm is not None:
        replicated.scale_gradients(factor)
    if clip_norm is not None or scale != 1.0:
        backend.scale_gradients(factor / scale)
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

    def __init__(self, loss: float, norm: float, *, may_overflow: bool) -> None:
        super().__init__(f"loss {loss:.4g}, gradient norm {norm:.4g}")
        self.may_overflow = may_overflow
        """The loss and the objectives' own gradients are finite: only the towers' are not."""


def _leaves(features: Features, taught: Sequence[FeatureRequest]) -> Features:
    return {r: f.detach().requires_grad_(r in taught) for r, f in features.items()}


def _detached(features: Features) -> Features:
    return {r: f.detach() for r, f in features.items()}
