"""A row for every sample of the data, spread over the ranks: the memory of instance and cluster discrimination.

Each rank keeps a contiguous share of the ids. Reading and writing are collectives: ids travel to all, rows only to
who asked. It does not choose what to remember; InterCLR's and Wu et al.'s momentum is the caller's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.distributed.collectives import all_gather_rows, reduce_scatter_rows, row_counts
from pretrain.distributed.groups import Group
from pretrain.objectives.pieces.sharded import Sharded


class MemoryBank(Sharded):
    """(samples, dim) rows, zeros until first written; rank r of W holds ids [r N / W, (r + 1) N / W)."""

    def __init__(self, *, samples: int, dim: int, rank: int = 0, world: int = 1, group: Group = None) -> None:
        super().__init__()
        self.shape = (samples, dim)
        self.group = group
        self._first, self._stop = samples * rank // world, samples * (rank + 1) // world
        self._hold(torch.zeros(self._stop - self._first, dim), whole=world == 1)

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """(b, dim) rows of this rank's `ids` (b,) int64; b may differ over ranks and be 0.

        Raises IndexError, on all ranks alike, for an id beyond the bank.
        """
        counts = row_counts(len(ids), self.held.device, self.group)
        wanted = all_gather_rows(ids, self.group, counts)
        self._check(wanted)
        found = self.held.new_zeros(len(wanted), self.shape[1])
        mine = self._mine(wanted)
        found[mine] = self.held[wanted[mine] - self._first]
        return reduce_scatter_rows(found, counts, self.group)

    @torch.no_grad()
    def write(self, ids: Tensor, rows: Tensor) -> None:
        """Set this rank's `ids` (b,) to `rows` (b, dim); of one id written twice the last global row stands."""
        counts = row_counts(len(ids), self.held.device, self.group)
        everyone = all_gather_rows(ids, self.group, counts)
        self._check(everyone)
        values = all_gather_rows(rows.to(self.held.dtype), self.group, counts)
        kept = _last_of_each(everyone)
        kept = kept[self._mine(everyone[kept])]
        self.held[everyone[kept] - self._first] = values[kept]

    def parts(self) -> list[tuple[int, Tensor]]:
        return [(self._first * self.shape[1], self.held.view(-1))]

    def _mine(self, ids: Tensor) -> Tensor:
        return (ids >= self._first) & (ids < self._stop)

    def _check(self, ids: Tensor) -> None:
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < self.shape[0]):
            raise IndexError(f"ids {int(ids.min())} to {int(ids.max())} are not all in a bank of {self.shape[0]} rows")


def _last_of_each(ids: Tensor) -> Tensor:
    """Positions of the last occurrence of every id."""
    values, inverse = ids.unique(return_inverse=True)
    last = torch.full((len(values),), -1, dtype=torch.int64, device=ids.device)
    return last.scatter_reduce_(0, inverse, torch.arange(len(ids), device=ids.device), "amax")
