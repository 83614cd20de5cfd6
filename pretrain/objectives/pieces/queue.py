"""The rows of the last global batches, first in, first out: SwAV's queue of embeddings, MoCo's of keys.

Whole global batches go in, so what the queue holds does not depend on the world. A row of zeros is no row: that is
how an empty place and a damaged sample look, and whoever scores the queue leaves them out (`present`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.objectives.pieces.sharded import Sharded


class RowQueue(Sharded):
    """`kinds` of rows (one an assigning crop, say) of the last `rows` samples.

    Each rank keeps the rows it put in; without `rank` and `world` every rank keeps all and puts in gathered rows.

    Raises:
        UserError: `rows` is no multiple of the global batch; `key` is how the recipe calls it.
    """

    def __init__(
        self, key: str, *, rows: int, global_batch: int, dim: int, rank: int = 0, world: int = 1, kinds: int = 1
    ) -> None:
        super().__init__()
        _check(key, rows, global_batch)
        self.batches, self.kinds, self.dim = rows // global_batch, kinds, dim
        self._global_batch, self._rank = global_batch, rank
        self.shape = (self.batches, kinds, global_batch, dim)
        self._hold(torch.zeros(self.batches, kinds, global_batch // world, dim), whole=world == 1)

    def full(self, pushes: int) -> bool:
        """Whether every place was filled after `pushes` pushes."""
        return pushes >= self.batches

    def rows(self, kind: int = 0) -> Tensor:
        """(rows this rank holds, dim), zeros where there is none."""
        return self.held[:, kind].flatten(0, 1)

    @torch.no_grad()
    def push(self, new: Tensor, pushes: int) -> None:
        """Put in (kinds, b, dim), this rank's rows of one global batch, in the oldest one's place.

        `pushes`: how many there were before: a function of the step, so that it needs no keeping.
        """
        self.held[pushes % self.batches] = new.detach().to(self.held.dtype)

    def parts(self) -> list[tuple[int, Tensor]]:
        own = self.held.shape[2]
        found = []
        for batch in range(self.batches):
            for kind in range(self.kinds):
                row = (batch * self.kinds + kind) * self._global_batch + self._rank * own
                found.append((row * self.dim, self.held[batch, kind].view(-1)))
        return found


def present(rows: Tensor) -> Tensor:
    """(n,) bool: which of (n, dim) rows are rows and not empty places."""
    return rows.any(dim=-1)


def _check(key: str, rows: int, global_batch: int) -> None:
    if rows < 1 or rows % global_batch:
        below = rows // global_batch * global_batch
        near = f"{below} or {below + global_batch}" if below else str(global_batch)
        raise UserError(
            f"{key}: {rows} rows must be a multiple of global_batch {global_batch}, so that whole batches "
            f"leave it; try {near}"
        )
