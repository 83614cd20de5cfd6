"""Balanced assignment of samples to prototypes by Sinkhorn-Knopp, over ranks, in the log domain.

The official SwAV code takes exp(score / epsilon), which overflows fp16 at epsilon 0.05 and fp32 at 0.011, and
divides 0 by 0 where a prototype's row underflows. Here the first normalisation of the prototypes is a log-sum-exp
with the global maximum of each taken off. After it and one softmax over the prototypes, every prototype holds at
least 1 / (B K) of the mass, so the rounds that follow are plain multiplications that can neither overflow nor
divide by zero: one exponential a score, whatever the number of rounds.

A round costs one reduction of K numbers; problems stacked in a leading axis (SwAV's assigning crops) share it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.distributed.collectives import all_reduce_max, all_reduce_sum
from pretrain.distributed.groups import Group
from pretrain.objectives.functional.reduction import at_least_fp32


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    weight: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """Soft assignments of this rank's rows, each summing to 1: `scores`' shape, at least fp32, no gradient.

    The official `distributed_sinkhorn` (Caron et al. 2020, SwAV, §3.1 and its code): exp(scores / epsilon), then
    `iterations` times the prototypes are brought to equal mass over the global batch and the rows to mass 1.

    scores: (B, K) of this rank, or (A, B, K) for A independent problems; B may differ over ranks and be 0.
    weight: (B,); a row of weight 0 takes no part, gets zeros, and may hold anything (NaN too). A row of -inf alone
        takes no part either.
    Raises ValueError on shapes that do not fit, epsilon not above 0, or fewer than one iteration.
    """
    _check(scores, epsilon, iterations, weight)
    x = at_least_fp32(scores) / epsilon
    absent = (x == -torch.inf).all(-1, keepdim=True)  # (…, B, 1)
    if weight is not None:
        absent = absent | (weight.to(x.device) <= 0)[:, None]
    x = x.masked_fill_(absent, -torch.inf)
    highest = all_reduce_max(_highest(x), group)
    x -= highest.masked_fill_(highest == -torch.inf, 0.0).unsqueeze(-2)
    mass = all_reduce_sum(x.exp().sum(-2), group)
    q = (x - mass.log().unsqueeze(-2)).softmax(-1).masked_fill_(absent, 0.0)
    tiny = torch.finfo(q.dtype).tiny
    for _ in range(iterations - 1):
        q /= all_reduce_sum(q.sum(-2), group).clamp_(min=tiny).unsqueeze(-2)
        q /= q.sum(-1, keepdim=True).clamp_(min=tiny)
    return q


def _highest(x: Tensor) -> Tensor:
    """(…, K) maximum over the rows; -inf where there are none."""
    if x.shape[-2]:
        return x.amax(-2)
    return x.new_full((*x.shape[:-2], x.shape[-1]), -torch.inf)


def _check(scores: Tensor, epsilon: float, iterations: int, weight: Tensor | None) -> None:
    if scores.dim() not in (2, 3):
        raise ValueError(f"scores must be (B, K) or (A, B, K), not {tuple(scores.shape)}")
    if weight is not None and weight.shape != scores.shape[-2:-1]:
        raise ValueError(f"weight must be one a row, shape ({scores.shape[-2]},), not {tuple(weight.shape)}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, not {epsilon}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}")
