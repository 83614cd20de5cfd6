"""BatchNorm over the global batch, on any backend that can all_reduce.

torch's own SyncBatchNorm refuses CPU tensors, so what it computes could not be tested on gloo. Here each rank
reduces its rows to (count, sum, sum of squares) a channel, one all_reduce in float64 makes them global, and
the backward all_reduces the two sums that the gradient needs: exact for ragged local batches and for a rank
without rows. Statistics are at least fp32. Gradients of weight and bias are this rank's share, as DDP expects
them.

A step that forwards a batch twice (cached features) must count it once: `frozen_statistics` does that.
Not done here: choosing whether a recipe wants synchronised statistics; cumulative averages (momentum None)
are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.distributed.collectives import all_reduce_sum
from pretrain.distributed.groups import Group


class SyncBatchNorm(_BatchNorm):
    """BatchNorm of (B, C) or (B, C, …) whose training statistics are those of all ranks' rows together.

    Parameters and buffers have BatchNorm's names. Every rank must call it, forward and backward, in the same
    order. `update_statistics = False` leaves running_mean, running_var and num_batches_tracked as they are.
    A backward with create_graph raises RuntimeError.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.group = group
        self.update_statistics = True

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"expected (B, {self.num_features}) or (B, {self.num_features}, …), got {tuple(input.shape)}"
            )

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        output, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps, self.group)
        if self.training and self.update_statistics:
            self._update(mean, variance, count)
        return output

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


class SyncBatchNormAct(SyncBatchNorm):
    """SyncBatchNorm followed by the dropout and activation of timm's BatchNormAct2d."""

    def __init__(self, *args, drop: nn.Module, act: nn.Module, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.drop = drop
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def convert(module: nn.Module, group: Group = None) -> nn.Module:
    """`module` with every BatchNorm replaced, timm's BatchNormAct2d (with its drop and act) too.

    Parameters and buffers stay the same objects. Children are replaced in place; use the returned module,
    since `module` itself may be a BatchNorm. Raises TypeError at a BatchNorm of a kind not known here: left
    alone, it would silently not be synchronised.
    """
    if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
        return _synchronised(module, group)
    for name, child in module.named_children():
        replacement = convert(child, group)
        if replacement is not child:
            setattr(module, name, replacement)
    return module


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Within: no BatchNorm in `module`, synchronised or not, updates its running statistics.

    Outputs and gradients are those of an ordinary training forward: only the bookkeeping is left out.
    """
    synchronised = [(m, m.update_statistics) for m in module.modules() if isinstance(m, SyncBatchNorm)]
    plain = [m for m in module.modules() if isinstance(m, _BatchNorm) and not isinstance(m, SyncBatchNorm)]
    before = [(m.momentum, None if m.num_batches_tracked is None else m.num_batches_tracked.clone()) for m in plain]
    try:
        for sync, _ in synchronised:
            sync.update_statistics = False
        for norm in plain:
            norm.momentum = 0.0
        yield
    finally:
        for sync, update in synchronised:
            sync.update_statistics = update
        for norm, (momentum, tracked) in zip(plain, before):
            norm.momentum = momentum
            if tracked is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(tracked)


def _synchronised(old: _BatchNorm, group: Group) -> SyncBatchNorm:
    from timm.layers.norm_act import BatchNormAct2d

    settings = (old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
    if type(old) is BatchNormAct2d:
        new: SyncBatchNorm = SyncBatchNormAct(*settings, group=group, drop=old.drop, act=old.act)
    elif type(old) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        new = SyncBatchNorm(*settings, group=group)
    else:
        raise TypeError(
            f"no synchronised form of {type(old).__qualname__} is known; "
            "use BatchNorm1d, BatchNorm2d, BatchNorm3d or timm's BatchNormAct2d"
        )
    for name in ("weight", "bias"):
        new.register_parameter(name, getattr(old, name))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        new.register_buffer(name, getattr(old, name))
    return new.train(old.training)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) · weight + bias, mean and variance over the rows of all ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group):
        mean, variance, count = _global_moments(x, group)
        inverse = (variance + eps).rsqrt()
        factor = inverse if weight is None else inverse * weight.to(inverse.dtype)
        output = (x.to(mean.dtype) - _channels(mean, x)) * _channels(factor, x)
        if bias is not None:
            output += _channels(bias.to(mean.dtype), x)
        ctx.save_for_backward(x, weight, mean, inverse, count)
        ctx.group = group
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(mean, variance, count)
        return output.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        if torch.is_grad_enabled():  # create_graph=True: a penalty on the gradient would silently have none
            raise RuntimeError("SyncBatchNorm has no second derivative: call backward without create_graph")
        x, weight, mean, inverse, count = ctx.saved_tensors
        dims = [d for d in range(x.dim()) if d != 1]
        grad = grad.to(mean.dtype)
        unit = (x.to(mean.dtype) - _channels(mean, x)) * _channels(inverse, x)
        d_bias, d_weight = grad.sum(dims), (grad * unit).sum(dims)
        d_x = None
        if ctx.needs_input_grad[0]:
            mean_grad, mean_grad_unit = all_reduce_sum(torch.stack([d_bias, d_weight]), ctx.group) / count.to(
                mean.dtype
            )
            factor = inverse if weight is None else inverse * weight.to(inverse.dtype)
            d_x = grad - _channels(mean_grad, x) - unit.mul_(_channels(mean_grad_unit, x))
            d_x = d_x.mul_(_channels(factor, x)).to(x.dtype)
        d_weight = None if weight is None else d_weight.to(weight.dtype)
        return (
            d_x,
            d_weight,
            (d_bias.to(weight.dtype) if ctx.has_bias and weight is not None else None),
            None,
            None,
        )


def _global_moments(x: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """(mean (C,), biased variance (C,), rows a channel (1,)) over all ranks.

    Sums of squares are combined in float64, where mean² - E[x²] loses nothing that fp32 could hold; each
    rank's own variance is computed around its own mean before that.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    dims = [d for d in range(x.dim()) if d != 1]
    channels = x.shape[1]
    sums = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    rows = x.numel() // channels
    if rows:
        variance, mean = (s.double() for s in torch.var_mean(x.to(dtype), dims, correction=0))
        sums[:channels] = mean * rows
        sums[channels:-1] = (variance + mean.square()) * rows
        sums[-1] = rows
    sums = all_reduce_sum(sums, group)
    count = sums[-1:].clamp(min=1)
    mean = sums[:channels] / count
    variance = (sums[channels:-1] / count - mean.square()).clamp(min=0)
    return mean.to(dtype), variance.to(dtype), count


def _channels(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *([1] * (x.dim() - 2)))
