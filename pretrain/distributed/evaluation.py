"""Evaluate on all ranks: each takes a contiguous share of the rows, and the results come back whole.

A share is computed from (n, rank, world) alone, so no rank has to tell another what it took, the rows are in
their old order again after the gather, and there may be fewer rows than ranks. Padding is cut off inside: no
dummy row ever reaches a metric. What is computed on the rows is the caller's.
"""

from __future__ import annotations

from torch import Tensor

from pretrain.distributed.collectives import all_gather_rows
from pretrain.distributed.groups import Group, resolve


def shard_rows(n: int, group: Group = None) -> tuple[int, int]:
    """This rank's rows [lo, hi) of `n`; shares differ by at most one row and may be empty."""
    _, rank, world = resolve(group)
    return n * rank // world, n * (rank + 1) // world


def gather_rows(local: Tensor, n: int, group: Group = None) -> Tensor:
    """(hi - lo, …) results of this rank's `shard_rows(n)` -> (n, …) on every rank, in order; no gradient.

    All ranks must call it, those without a row too (with a tensor of 0 rows and the same other dimensions).
    Raises ValueError when `local` has not as many rows as the rank's share.
    """
    _, rank, world = resolve(group)
    counts = [n * (r + 1) // world - n * r // world for r in range(world)]
    if local.shape[0] != counts[rank]:
        lo, hi = shard_rows(n, group)
        raise ValueError(
            f"rank {rank} of {world} holds {local.shape[0]} rows, but its share of {n} is rows {lo} to {hi}: "
            "take the rows that shard_rows gives"
        )
    return all_gather_rows(local, group, counts)
