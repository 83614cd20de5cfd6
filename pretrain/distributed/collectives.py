"""The few collectives the package needs, on rows that may be ragged over ranks, on gloo and nccl alike.

Rows of all ranks stand one after the other in rank order. Unequal row counts are padded to the longest and
cut again, because neither backend moves ragged pieces in one call; equal counts pay nothing for it. All ranks
of a group must make the same calls in the same order, a rank without rows too. Nothing here is
differentiable: whoever needs a gradient states it in closed form. With one process every function returns at
once and communicates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.distributed.groups import Group, resolve


def row_counts(rows: int, device: torch.device, group: Group = None) -> list[int]:
    """How many rows each rank has, in rank order. `device`: where the group's backend wants its tensors."""
    process_group, _, world = resolve(group)
    if world == 1:
        return [rows]
    counts = torch.empty(world, dtype=torch.int64, device=device)
    mine = torch.tensor([rows], dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, mine, group=process_group)
    return counts.tolist()


def all_gather_rows(x: Tensor, group: Group = None, counts: Sequence[int] | None = None) -> Tensor:
    """(b, …) on each rank -> (Σ b, …) on every rank, in rank order; no gradient.

    `counts` are the ranks' row counts where they are known already; without them they are asked for.
    Raises ValueError when `counts` and the rows given disagree.
    """
    process_group, rank, world = resolve(group)
    if world == 1:
        return x.detach()
    counts = row_counts(x.shape[0], x.device, group) if counts is None else list(counts)
    _check_counts(counts, world, rank, x.shape[0])
    longest = max(counts)
    everyone = x.new_empty((world * longest, *x.shape[1:]))
    if everyone.numel():
        dist.all_gather_into_tensor(everyone, _pad(x.detach(), longest), group=process_group)
    return _unpad(everyone, counts, longest)


def reduce_scatter_rows(x: Tensor, counts: Sequence[int], group: Group = None) -> Tensor:
    """(Σ b, …) on each rank -> this rank's (b, …) rows of the sum over ranks; `counts` are the ranks' b.

    Raises ValueError when `counts` do not add up to the rows of `x`.
    """
    process_group, rank, world = resolve(group)
    if sum(counts) != x.shape[0]:
        raise ValueError(
            f"{x.shape[0]} rows to scatter, but the ranks' row counts {list(counts)} add up to {sum(counts)}"
        )
    if world == 1:
        return x
    longest = max(counts)
    mine = x.new_empty((longest, *x.shape[1:]))
    if mine.numel():
        pieces = torch.cat([_pad(piece, longest) for piece in x.split(list(counts))]) if len(set(counts)) > 1 else x
        dist.reduce_scatter_tensor(mine, pieces.contiguous(), group=process_group)
    return mine[: counts[rank]]


def all_reduce_sum(x: Tensor, group: Group = None) -> Tensor:
    """The sum of `x` over ranks, written into `x` and returned."""
    return _all_reduce(x, dist.ReduceOp.SUM, group)


def all_reduce_max(x: Tensor, group: Group = None) -> Tensor:
    """The elementwise maximum of `x` over ranks, written into `x` and returned."""
    return _all_reduce(x, dist.ReduceOp.MAX, group)


def _all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType, group: Group) -> Tensor:
    process_group, _, world = resolve(group)
    if world > 1 and x.numel():
        dist.all_reduce(x, op, group=process_group)
    return x


def _check_counts(counts: Sequence[int], world: int, rank: int, rows: int) -> None:
    if len(counts) != world or counts[rank] != rows:
        raise ValueError(f"rank {rank} of {world} holds {rows} rows, but the row counts given are {list(counts)}")


def _pad(x: Tensor, rows: int) -> Tensor:
    if x.shape[0] == rows:
        return x.contiguous()
    return torch.cat([x, x.new_zeros((rows - x.shape[0], *x.shape[1:]))])


def _unpad(padded: Tensor, counts: Sequence[int], longest: int) -> Tensor:
    if all(count == longest for count in counts):
        return padded
    return torch.cat([padded[r * longest : r * longest + count] for r, count in enumerate(counts)])
