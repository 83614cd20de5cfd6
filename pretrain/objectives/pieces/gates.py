"""Hydra's feature filter: which dimensions a pair of classes is compared in.

Symmetric in the two classes. BatchNorm inside uses the batch's pairs while training, so a gate depends on its batch
there; `.eval()` gives each pair the one gate that is its own, which is what `read` and `classes` are for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.distributed.syncbn import SyncBatchNorm

BLOCK = 4096  # pairs at a time


class Gates(nn.Module):
    """g(a, b) = σ(f((e_a + e_b) / 2)), or σ(f(e_a)) · σ(f(e_b)) without `fuse`; e: a learned vector a class.

    f: ReLU, BatchNorm, Linear, ReLU, BatchNorm, Linear (the authors' code).
    """

    def __init__(self, classes: int, width: int, hidden: int, dim: int, *, fuse: bool = True) -> None:
        super().__init__()
        self.dim, self.fuse = dim, fuse
        self.embedding = nn.Embedding(classes, width)
        self.filter = nn.Sequential(
            nn.ReLU(),
            nn.BatchNorm1d(width),
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.BatchNorm1d(hidden),
            nn.Linear(hidden, dim),
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """(b, dim) in (0, 1) of b pairs of classes, (b,) int64 each. With SyncBatchNorm b may be 0 on a rank."""
        a, b = self.embedding(first), self.embedding(second)
        if self.fuse:
            return self._filtered((a + b) / 2).sigmoid()
        left, right = self._filtered(torch.cat([a, b])).sigmoid().chunk(2)  # one batch: symmetric
        return left * right

    def _filtered(self, x: Tensor) -> Tensor:
        """`filter`; a single row, which has no batch statistics of its own, by the running ones."""
        if len(x) > 1 or not self.training or self._synchronised:
            return self.filter(x)
        norms = [m for m in self.filter if isinstance(m, _BatchNorm)]
        for norm in norms:
            norm.eval()
        try:
            return self.filter(x)
        finally:
            for norm in norms:
                norm.train()

    @property
    def _synchronised(self) -> bool:
        return any(isinstance(m, SyncBatchNorm) for m in self.filter)

    @property
    def size(self) -> int:
        """Number of classes."""
        return self.embedding.num_embeddings

    @torch.no_grad()
    def read(self, first: Tensor, second: Tensor) -> Tensor:
        """(b, dim) gates of b pairs in evaluation mode, whatever mode the module is in."""
        training = self.training
        self.eval()
        try:
            return self(first, second)
        finally:
            self.train(training)

    def classes(self) -> Tensor:
        """(classes, dim) gates of each class with itself, in evaluation mode."""
        everyone = torch.arange(self.size, device=self.embedding.weight.device)
        return torch.cat([self.read(part, part) for part in everyone.split(BLOCK)])

    def pairs(self, block: int = BLOCK) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(a (b,), b (b,), gates (b, dim)) of all pairs a <= b, in blocks of at most `block`, in evaluation mode."""
        device = self.embedding.weight.device
        total = self.size * (self.size + 1) // 2
        for start in range(0, total, block):
            a, b = _unranked(torch.arange(start, min(start + block, total), device=device))
            yield a, b, self.read(a, b)


def _unranked(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs a <= b of these numbers, counted (0, 0), (0, 1), (1, 1), (0, 2), …"""
    b = ((8 * numbers.double() + 1).sqrt() / 2 - 0.5).long()
    b += ((b + 1) * (b + 2) // 2 <= numbers).long()
    b -= (b * (b + 1) // 2 > numbers).long()
    return numbers - b * (b + 1) // 2, b
