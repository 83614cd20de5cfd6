"""What is done to the gradients that lie with parameters: their norm, one factor for all, and clearing them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pretrain.distributed.shards import local


def squared_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Scalar in float64: the sum of squares of what is here; no communication."""
    norms = torch._foreach_norm(_present(parameters))
    return torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)


def scale(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients by a scalar."""
    if gradients := _present(parameters):
        torch._foreach_mul_(gradients, factor.to(gradients[0]))


def drop(parameters: Iterable[nn.Parameter]) -> None:
    """Clear them."""
    for p in parameters:
        p.grad = None


def _present(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [local(p.grad) for p in parameters if p.grad is not None]
