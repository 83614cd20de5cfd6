"""SwAV's swapped prediction (Caron et al. 2020): each crop predicts the assignments of the others.

Scores come in, a loss goes out; heads, prototypes and the queue's memory are the objective's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.distributed.groups import Group
from pretrain.objectives.functional.assignment import sinkhorn
from pretrain.objectives.functional.reduction import at_least_fp32, global_mean


def swav_loss(
    scores: Sequence[Tensor],
    *,
    assign: Sequence[int] = (0, 1),
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    queue_scores: Sequence[Tensor] | None = None,
    weight: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """The swapped prediction loss, shape (): the mean over rows, assigning crops and the crops that predict each.

    scores: one (B, K) a crop, cosines of this rank's rows with the prototypes; B may differ over ranks and be 0.
    assign: crops whose assignments are predicted by all others.
    queue_scores: one (Q, K) an assigning crop: older rows that share the assignment and are in no loss; a row of
        -inf is no row.
    weight: (B,) ≥ 0; a row of weight 0 is absent, whatever it holds; the mean is over the total weight.
    Raises ValueError on shapes that do not fit, fewer than two crops, or an assigning crop that is none.
    """
    _check(scores, assign, queue_scores)
    q = swav_assignments(
        [scores[i] for i in assign],
        epsilon=epsilon, iterations=iterations, queue_scores=queue_scores, weight=weight, group=group,
    )  # fmt: skip
    rows = swav_rows(scores, q, assign=assign, temperature=temperature, weight=weight)
    count = len(rows) if weight is None else weight.sum()
    return global_mean(rows.sum(), count, group)


def swav_assignments(
    scores: Sequence[Tensor],
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    queue_scores: Sequence[Tensor] | None = None,
    weight: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """(A, B, K) assignments of the A assigning crops' rows; the queues' rows take part and are left out again."""
    stacked = torch.stack([at_least_fp32(s.detach()) for s in scores])
    rows = stacked.shape[1]
    if weight is not None:
        stacked = stacked.masked_fill((weight <= 0)[:, None], -torch.inf)
    if queue_scores is not None:
        stacked = torch.cat([torch.stack([at_least_fp32(s.detach()) for s in queue_scores]), stacked], dim=1)
    q = sinkhorn(stacked, epsilon=epsilon, iterations=iterations, group=group)
    return q[:, q.shape[1] - rows :]


def swav_rows(
    scores: Sequence[Tensor],
    assignments: Tensor,
    *,
    assign: Sequence[int],
    temperature: float,
    weight: Tensor | None = None,
) -> Tensor:
    """(B,) each row's loss times its weight, given the (A, B, K) assignments."""
    everyone = assignments.sum(0)
    # a crop predicts all assignments but its own; the cross-entropy is linear in its target
    targets = [everyone - assignments[assign.index(v)] if v in assign else everyone for v in range(len(scores))]
    logits = torch.stack([at_least_fp32(s) for s in scores]) / temperature  # (V, B, K)
    if weight is not None:
        logits = logits.masked_fill((weight <= 0)[:, None], 0.0)
    rows = -(torch.stack(targets) * F.log_softmax(logits, dim=-1)).sum((0, 2))
    rows = rows / (len(assign) * (len(scores) - 1))
    return rows if weight is None else rows * weight


def _check(scores: Sequence[Tensor], assign: Sequence[int], queue_scores: Sequence[Tensor] | None) -> None:
    shapes = {tuple(s.shape) for s in scores}
    if len(scores) < 2 or len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise ValueError(
            f"scores must be (B, K), one a crop, of two crops or more; not {[tuple(s.shape) for s in scores]}"
        )
    if not assign or len(set(assign)) < len(assign) or not all(0 <= i < len(scores) for i in assign):
        raise ValueError(f"assign must name crops among the {len(scores)} there are, each once; not {tuple(assign)}")
    if queue_scores is not None and len(queue_scores) != len(assign):
        raise ValueError(f"queue_scores must be one an assigning crop: {len(assign)}, not {len(queue_scores)}")
