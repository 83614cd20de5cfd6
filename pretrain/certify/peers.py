"""What the peers' own losses give over ranks, on the same features: how far DDP's mean of their gradients is off.

DDP averages the ranks' gradients, so a parameter gets the mean of what every rank's loss sends back: the gradient of
the global loss only if each rank's loss sends W times its share. Features are leaves here; the mean over ranks is
taken by dividing by W. Rows have no weights and ids of their own: these losses know neither.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.certify.shrink import ROWS
from pretrain.distributed.collectives import all_reduce_max
from pretrain.distributed.groups import LOCAL
from pretrain.distributed.process import Process
from pretrain.objectives.functional import clip_loss, siglip_loss, swav_loss

DIM = 16

Loss = Callable[..., Tensor]
"""(features of this rank's rows …, learned scalars …) -> what this rank calls backward on."""


@dataclass(frozen=True)
class Peer:
    """One loss at one world."""

    name: str
    world: int
    figure: float | None
    """Worst max |g - g64| / max |g64| over features and learned scalars, g as DDP would average it; None: not there."""
    note: str


def peers_at(process: Process, objectives: Sequence[str]) -> list[Peer]:
    """The peers of these objectives, each beside ours; called by all ranks together."""
    found = []
    for objective, (ours, makers) in _BESIDE.items():
        if objective in objectives:
            found.append(_peer(f"polyview {objective}", process, objective, ours))
            found += [_made(name, maker, process, objective) for name, maker in makers.items()]
    return found


def _made(name: str, maker: Callable[[Process], Loss], process: Process, objective: str) -> Peer:
    package = name.split()[0]
    if importlib.util.find_spec(package) is None:
        return Peer(name, process.world, None, f"{package} is not installed")
    return _peer(name, process, objective, maker(process))


def _peer(name: str, process: Process, objective: str, loss: Loss) -> Peer:
    rows, scalars = _given(objective)
    exact = _gradients(_BESIDE[objective][0], rows, scalars, group=LOCAL)
    share = ROWS // process.world
    mine = slice(process.rank * share, (process.rank + 1) * share)
    found = _gradients(loss, [x[mine].float() for x in rows], [s.float() for s in scalars])
    exact = [e[mine] for e in exact[: len(rows)]] + exact[len(rows) :]
    for scalar in found[len(rows) :]:
        torch.distributed.all_reduce(scalar)
    pairs = list(zip((g.double() / process.world for g in found), exact))
    figure = max(float((g - e).abs().max() / e.abs().max()) for g, e in pairs)
    figure = float(all_reduce_max(torch.tensor([figure], dtype=torch.float64)))
    (g, e), *_ = pairs
    return Peer(name, process.world, figure, f"{float((g * e).sum() / e.square().sum()):.3f} of the right gradient")


def _given(objective: str) -> tuple[list[Tensor], list[Tensor]]:
    """The global batch's features, and the learned scalars, in float64."""
    g = torch.Generator().manual_seed(0)
    common = torch.randn(ROWS, DIM, generator=g, dtype=torch.float64)
    rows = [F.normalize(common + torch.randn(ROWS, DIM, generator=g, dtype=torch.float64), dim=1) for _ in range(2)]
    scalars = {"clip": [math.log(1 / 0.07)], "siglip": [math.log(10), -10.0], "swav": []}[objective]
    return rows, [torch.tensor([s], dtype=torch.float64) for s in scalars]


def _gradients(loss: Loss, rows: Sequence[Tensor], scalars: Sequence[Tensor], **options: Any) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (*rows, *scalars)]
    return list(torch.autograd.grad(loss(*leaves, **options), leaves))


# ---- ours and theirs


def _clip(image: Tensor, text: Tensor, log_scale: Tensor, **options: Any) -> Tensor:
    return clip_loss(image, text, log_scale, **options)


def _siglip(image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return siglip_loss(image, text, log_scale, bias, **options)


def _swav(first: Tensor, second: Tensor, **options: Any) -> Tensor:
    return swav_loss([first, second], **options)


def _open_clip(**flags: bool) -> Callable[[Process], Loss]:
    def maker(process: Process) -> Loss:
        from open_clip.loss import ClipLoss

        theirs = ClipLoss(rank=process.rank, world_size=process.world, **flags)
        return lambda image, text, log_scale: theirs(image, text, log_scale.exp())

    return maker


def _open_clip_siglip(process: Process) -> Loss:
    from open_clip.loss import SigLipLoss

    theirs = SigLipLoss(rank=process.rank, world_size=process.world)
    return lambda image, text, log_scale, bias: theirs(image, text, log_scale.exp(), bias)


def _lightly_swav(gather: bool) -> Callable[[Process], Loss]:
    def maker(process: Process) -> Loss:
        from lightly.loss import SwaVLoss

        theirs = SwaVLoss(sinkhorn_gather_distributed=gather)
        return lambda first, second: theirs([first, second], [])

    return maker


_BESIDE: dict[str, tuple[Loss, dict[str, Callable[[Process], Loss]]]] = {
    "clip": (
        _clip,
        {
            "open_clip ClipLoss, as its flags are by default": _open_clip(),
            "open_clip ClipLoss, gather_with_grad": _open_clip(gather_with_grad=True),
            "open_clip ClipLoss, local_loss and gather_with_grad": _open_clip(local_loss=True, gather_with_grad=True),
        },
    ),
    "siglip": (_siglip, {"open_clip SigLipLoss": _open_clip_siglip}),
    "swav": (
        _swav,
        {
            "lightly SwaVLoss, as its flags are by default": _lightly_swav(False),
            "lightly SwaVLoss, sinkhorn_gather_distributed": _lightly_swav(True),
        },
    ),
}
"""Objective -> (our loss, the peers')."""
