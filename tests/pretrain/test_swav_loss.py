"""Sinkhorn and SwAV's loss against the official formulas in float64, lightly's package, and worlds 2 and 3."""

from __future__ import annotations

import lightly.loss.swav_loss as lightly_swav
import pytest
import torch
import torch.nn.functional as F

from pretrain.distributed.groups import LOCAL
from pretrain.objectives.functional import sinkhorn, swav_loss
from tests.ranks import run_ranks

K = 7


def official_sinkhorn(scores: torch.Tensor, epsilon: float = 0.05, iterations: int = 3) -> torch.Tensor:
    """The official code's order of operations, in one process."""
    q = torch.exp(scores / epsilon).T
    b, k = q.shape[1], q.shape[0]
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / k
        q = q / q.sum(dim=0, keepdim=True) / b
    return (q * b).T


def official_loss(scores: list, assign=(0, 1), queue: list | None = None, **kwargs) -> torch.Tensor:
    loss = 0.0
    for n, i in enumerate(assign):
        out = scores[i].detach()
        q = official_sinkhorn(torch.cat([queue[n], out]) if queue else out, **kwargs)[-len(out) :]
        others = [v for v in range(len(scores)) if v != i]
        loss += sum(-(q * F.log_softmax(scores[v] / 0.1, dim=1)).sum(1).mean() for v in others) / len(others)
    return loss / len(assign)


def cosines(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=g, dtype=torch.float64) * 2 - 1).to(dtype)


def crops(count: int, rows: int = 12, seed: int = 0, dtype=torch.float64) -> list[torch.Tensor]:
    return [cosines(rows, K, seed=seed + i, dtype=dtype).requires_grad_() for i in range(count)]


@pytest.mark.parametrize("rows", [1, 2, 13])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_is_the_official_one(rows, iterations):
    scores = cosines(rows, K)
    q = sinkhorn(scores, iterations=iterations)
    assert q.dtype == torch.float64
    torch.testing.assert_close(q, official_sinkhorn(scores, iterations=iterations), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(q.sum(1), torch.ones(rows, dtype=torch.float64))


def test_sinkhorn_is_lightlys():
    scores = cosines(64, 30, dtype=torch.float32)
    torch.testing.assert_close(sinkhorn(scores), lightly_swav.sinkhorn(scores), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("epsilon", [0.05, 0.005, 1e-4])
@pytest.mark.parametrize("kind", ["random", "equal", "zeros", "one far off", "times 100"])
def test_sinkhorn_stays_finite_where_the_plain_one_overflows(kind, epsilon):
    scores = cosines(40, K, dtype=torch.float32)
    if kind == "equal":
        scores[:] = 0.9
    elif kind == "zeros":
        scores.zero_()
    elif kind == "one far off":
        scores[:, 3] = -1.0
        scores[5] = -1.0
    elif kind == "times 100":
        scores *= 100
    q = sinkhorn(scores, epsilon=epsilon)
    assert torch.isfinite(q).all()
    torch.testing.assert_close(q.sum(1), torch.ones(40))
    if kind in ("equal", "zeros"):
        torch.testing.assert_close(q, torch.full_like(q, 1 / K))


def test_equal_use_of_prototypes_in_the_limit():
    q = sinkhorn(cosines(50, K), iterations=300)
    torch.testing.assert_close(q.sum(0), torch.full((K,), 50 / K, dtype=torch.float64), rtol=1e-6, atol=0)


def test_absent_rows_take_no_part_whatever_they_hold():
    scores, weight = cosines(9, K), torch.ones(9)
    weight[[0, 4]] = 0
    expected = torch.zeros(9, K, dtype=torch.float64)
    expected[weight > 0] = sinkhorn(scores[weight > 0])
    for rubbish in (torch.nan, torch.inf, -torch.inf, 1e30):
        broken = scores.clone()
        broken[[0, 4]] = rubbish
        torch.testing.assert_close(sinkhorn(broken, weight=weight), expected)
    broken[[0, 4]] = -torch.inf
    torch.testing.assert_close(sinkhorn(broken), expected)
    assert not sinkhorn(scores, weight=torch.zeros(9)).any()
    assert sinkhorn(scores[:0]).shape == (0, K)


def test_stacked_problems_are_independent():
    a, b = cosines(6, K), cosines(6, K, seed=1)
    torch.testing.assert_close(sinkhorn(torch.stack([a, b])), torch.stack([sinkhorn(a), sinkhorn(b)]))


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("queue", [False, True])
def test_value_and_gradients_are_those_of_the_official_formula(count, queue):
    older = [cosines(10, K, seed=50 + i) for i in range(2)] if queue else None
    ours, theirs = crops(count), crops(count)
    loss, expected = swav_loss(ours, queue_scores=older), official_loss(theirs, queue=older)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    loss.backward()
    expected.backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("queue", [False, True])
def test_it_is_lightlys_loss(queue):
    ours, theirs = crops(6, dtype=torch.float32), crops(6, dtype=torch.float32)
    older = [cosines(20, K, seed=50 + i, dtype=torch.float32) for i in range(2)] if queue else None
    loss = swav_loss(ours, queue_scores=older)
    expected = lightly_swav.SwaVLoss()(theirs[:2], theirs[2:], older)
    torch.testing.assert_close(loss, expected.squeeze(), rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_one_assigning_crop():
    torch.testing.assert_close(swav_loss(crops(4), assign=(2,)), official_loss(crops(4), assign=(2,)))


def test_an_absent_row_is_as_if_it_were_not_there():
    scores, weight = crops(3), torch.ones(12, dtype=torch.float64)
    weight[3] = 0
    kept = [torch.cat([s[:3], s[4:]]).detach().requires_grad_() for s in scores]
    with torch.no_grad():
        scores[1][3] = torch.nan
    loss, expected = swav_loss(scores, weight=weight), swav_loss(kept)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for a, b in zip(scores, kept):
        torch.testing.assert_close(torch.cat([a.grad[:3], a.grad[4:]]), b.grad)
        assert not a.grad[3].any()


def test_nothing_to_learn_from_gives_zero():
    for weight, rows in ((torch.zeros(12), 12), (None, 0)):
        scores = crops(3, rows)
        loss = swav_loss(scores, weight=weight)
        loss.backward()
        assert loss == 0
        assert not any(s.grad.any() for s in scores)


def test_half_precision_scores_are_scored_in_fp32():
    scores = [s.detach().half() for s in crops(3, dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = swav_loss(scores)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, official_loss([s.float() for s in scores]), rtol=1e-5, atol=0)


COUNTS = {1: (12,), 2: (5, 7), 3: (4, 0, 8)}


def of_rank(rank: int, world: int) -> list[torch.Tensor]:
    """Loss, gradients and assignments of this rank's ragged rows; row 6 is absent, the queue ragged too."""
    start = sum(COUNTS[world][:rank])
    own = slice(start, start + COUNTS[world][rank])
    weight = torch.ones(12, dtype=torch.float64)
    weight[6] = 0
    older = [cosines(12, K, seed=50 + i)[own] for i in range(2)]
    scores = [s.detach()[own].requires_grad_() for s in crops(4)]
    loss = swav_loss(scores, weight=weight[own], queue_scores=older)
    loss.backward()
    q = sinkhorn(torch.stack(scores).detach(), weight=weight[own])
    return [loss.detach(), torch.stack([s.grad for s in scores]) / world, q]


def test_any_world_gives_the_same():
    loss, gradients, q = of_rank(0, 1)
    for world in (2, 3):
        ranks = run_ranks(of_rank, world)
        for rank in ranks:
            torch.testing.assert_close(rank[0], loss, rtol=1e-13, atol=0)
        torch.testing.assert_close(torch.cat([r[1] for r in ranks], 1), gradients, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(torch.cat([r[2] for r in ranks], 1), q, rtol=1e-12, atol=1e-15)


def test_a_group_of_one_never_communicates():
    torch.testing.assert_close(swav_loss(crops(3), group=LOCAL), swav_loss(crops(3)))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: sinkhorn(torch.zeros(3)), r"\(B, K\)"),
        (lambda: sinkhorn(torch.zeros(3, 2), epsilon=0), "epsilon"),
        (lambda: sinkhorn(torch.zeros(3, 2), iterations=0), "iterations"),
        (lambda: sinkhorn(torch.zeros(3, 2), weight=torch.ones(2)), "weight"),
        (lambda: swav_loss([torch.zeros(3, 2)]), "two crops"),
        (lambda: swav_loss([torch.zeros(3, 2), torch.zeros(4, 2)]), "two crops"),
        (lambda: swav_loss(crops(2), assign=(0, 2)), "assign"),
        (lambda: swav_loss(crops(2), queue_scores=[torch.zeros(3, K)]), "queue_scores"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()
