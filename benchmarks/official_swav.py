"""SwAV's step as the official code orders it, written from its description: the peer of `benchmarks.swav_step`.

Crops of one size go through the backbone together, all crops through the head in one batch, one Sinkhorn a crop
with its reductions one by one, then LARC around SGD.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OfficialSwav(nn.Module):
    """Backbone, projection head, prototypes; `forward` is the official grouping by size."""

    def __init__(self, backbone: nn.Module, width: int, hidden: int, dim: int, prototypes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(
            nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim)
        )
        self.prototypes = nn.Linear(dim, prototypes, bias=False)

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        sizes = [c.shape[-1] for c in crops]
        starts = [i for i in range(len(crops)) if i == 0 or sizes[i] != sizes[i - 1]]
        ends = [*starts[1:], len(crops)]
        pooled = torch.cat([self.backbone(torch.cat(list(crops[a:b]))) for a, b in zip(starts, ends)])
        return self.prototypes(F.normalize(self.head(pooled), dim=1))


@torch.no_grad()
def sinkhorn(out: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    q = torch.exp(out / epsilon).T
    b, k = q.shape[1], q.shape[0]
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(dim=1, keepdim=True)
        q /= k
        q /= q.sum(dim=0, keepdim=True)
        q /= b
    q *= b
    return q.T


def swav_loss(output: Tensor, rows: int, crops: int) -> Tensor:
    loss = output.new_zeros(())
    for i in (0, 1):
        q = sinkhorn(output[rows * i : rows * (i + 1)].detach())
        part = output.new_zeros(())
        for v in range(crops):
            if v != i:
                x = output[rows * v : rows * (v + 1)] / 0.1
                part = part - (q * F.log_softmax(x, dim=1)).sum(dim=1).mean()
        loss = loss + part / (crops - 1)
    return loss / 2


@torch.no_grad()
def larc(parameters: Sequence[nn.Parameter], weight_decay: float, trust: float = 0.001) -> None:
    """Scale every gradient by trust · |p| / (|g| + weight decay · |p|), weight decay put in first."""
    for p in parameters:
        if p.grad is None:
            continue
        size, slope = p.norm(), p.grad.norm()
        if size != 0 and slope != 0:
            p.grad.add_(p, alpha=weight_decay).mul_(trust * size / (slope + weight_decay * size + 1e-8))


def step_of(model: OfficialSwav, crops: Sequence[Tensor], lr: float, weight_decay: float) -> Callable[[], Tensor]:
    """One training step on normalised `crops`."""
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)

    def step() -> Tensor:
        with torch.no_grad():
            model.prototypes.weight.copy_(F.normalize(model.prototypes.weight, dim=1))
        loss = swav_loss(model(crops), len(crops[0]), len(crops))
        optimizer.zero_grad()
        loss.backward()
        larc(parameters, weight_decay)
        optimizer.step()
        return loss.detach()

    return step
