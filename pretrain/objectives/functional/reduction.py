"""What every loss over ranks needs: a global mean whose gradient is the local share, and rows of all ranks with one.

The rule of the house (`functional`): the value is the global mean, on every rank; the gradient is W × the local
share, so that the mean over ranks that a backend takes is the gradient of the global mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.distributed.collectives import all_gather_rows, all_reduce_sum, reduce_scatter_rows, row_counts
from pretrain.distributed.groups import Group, resolve


def at_least_fp32(x: Tensor) -> Tensor:
    """`x`, or its fp32 copy when it is of lower precision; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def global_mean(share: Tensor, count: Tensor | float, group: Group = None) -> Tensor:
    """Σ share / Σ count over ranks, shape (); its gradient is W × this rank's share. 0 where the count is 0.

    share: () with a graph, what this rank's rows add up to; count: how much this rank divides by.
    """
    world = resolve(group)[2]
    count = torch.as_tensor(count, dtype=share.dtype, device=share.device)
    total, count = all_reduce_sum(torch.stack((share.detach(), count)), group).unbind()
    count = torch.where(count > 0, count, torch.ones_like(count))
    return total / count + world * (share - share.detach()) / count


def gather_rows(x: Tensor, group: Group = None, counts: list[int] | None = None) -> Tensor:
    """(b, …) on each rank -> (Σ b, …) on every rank, in rank order; gradients go back to the rank they belong to.

    `counts` are the ranks' row counts where they are known already. Backward is a collective too: all ranks must run
    it.
    """
    if resolve(group)[2] == 1:
        return x
    return _GatherRows.apply(x, group, counts or row_counts(x.shape[0], x.device, group))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group, counts: list[int]) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return all_gather_rows(x, group, counts)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return reduce_scatter_rows(grad.contiguous(), ctx.counts, ctx.group), None, None
