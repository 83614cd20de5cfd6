"""Muon (Jordan et al. 2024) for the matrices of the towers' blocks, AdamW for everything else, as one optimizer.

A matrix moves by its momentum made orthogonal (all singular values near 1), scaled so that an element's root mean
square is AdamW's usual 0.2: AdamW's learning rate and decay carry over (Liu et al. 2025, arXiv 2502.16982, §2.2).
The fused matrix of queries, keys and values is three matrices, each made orthogonal by itself: as one, the largest of
the three would say how far the others move. Convolution kernels are no matrices: AdamW's.

torch.optim.Muon is the same for a whole matrix that lies on one rank; this also splits, and reads rows that are
spread over ranks (every rank gathers the matrix, turns it, and keeps its rows).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.distributed.shards import local, offset, whole

MOMENTUM = 0.95
"""Nesterov's, as in both papers."""
ROUNDS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration; Jordan's."""


class MuonAndAdamW(torch.optim.Optimizer):
    """Groups with `pieces` n > 0 are Muon's, their matrices n beside each other along the rows; the others AdamW's.

    `state` has `momentum_buffer` for Muon's, what AdamW keeps for the others.
    """

    def __init__(self, groups: list[dict[str, Any]], **kind: Any) -> None:
        super().__init__(groups, {"lr": kind["lr"]})
        others = [group for group in self.param_groups if not group["pieces"]]
        self._others = torch.optim.AdamW(others, fused=True, **kind) if others else None  # the same groups
        if self._others is not None:
            self._others.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient are skipped. All ranks call it together where rows are spread."""
        for group in self.param_groups:
            for p in group["params"] if group["pieces"] else ():
                if p.grad is not None:
                    _move(p, self.state[p], group)
        if self._others is not None:
            self._others.step()


def _move(p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    assert p.grad is not None
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(p)
    buffer = state["momentum_buffer"].lerp_(p.grad, 1 - MOMENTUM)
    pieces = whole(p.grad.lerp(buffer, MOMENTUM)).chunk(group["pieces"])
    rows, first = local(p), offset(p) // p.shape[1]
    moved = torch.cat([orthogonal(piece) for piece in pieces])[first : first + len(rows)]
    rows.mul_(1 - group["lr"] * group["weight_decay"])
    rows.add_(moved, alpha=-group["lr"] * 0.2 * max(pieces[0].shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """(m, n) -> (m, n) in bf16 with the same singular vectors and singular values of about 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
