"""MoCo's and DINO's losses beside lightly's package, and what their warnings and schedules say."""

from __future__ import annotations

import pytest
import torch
from lightly.loss import DINOLoss, NTXentLoss

from pretrain.models.request import FeatureRequest
from pretrain.objectives import build
from pretrain.objectives.base import Objective, RunFacts
from pretrain.reader import Batch

ROWS, WIDTH = 8, 10
FACTS = RunFacts(pooled_dim=WIDTH, global_batch=ROWS, total_steps=100, samples=800, seed=0)
MOCO = {"queue": 3 * ROWS, "dim": 6, "hidden": 12}
DINO = {"crops": [[2, None, [0.4, 1.0]], [3, 8, [0.1, 0.4]]], "prototypes": 20, "hidden": 12, "bottleneck": 6}


def objective(name: str, options: dict) -> Objective:
    return build({name: options}, FACTS)[name]


def batch(step: int, weight: torch.Tensor | None = None) -> Batch:
    rows = torch.arange(ROWS)
    weight = torch.ones(ROWS) if weight is None else weight
    return Batch(step, rows, rows * 0, rows * 0, [""] * ROWS, weight, rows * 0 - 1, {}, {}, {})


def features(requests: list[FeatureRequest], seed: int) -> dict[FeatureRequest, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {r: torch.randn(ROWS, WIDTH, generator=g).requires_grad_(not r.teacher) for r in requests}


def test_moco_is_lightlys_ntxent_with_a_memory_bank():
    moco = objective("moco", MOCO)
    theirs = NTXentLoss(temperature=0.2, memory_bank_size=(MOCO["queue"], MOCO["dim"]))
    for step in range(7):
        given = features(moco.requests(), step)
        q, k = moco.head(given[moco.query]), moco.key_head(given[moco.key])
        found, expected = moco.loss(given, batch(step), None).value, theirs(q, k)
        if step >= 3:  # lightly starts from random keys: ours are no negatives until they are real
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        moco.after_step(step)


def test_an_empty_queue_holds_no_negatives():
    moco = objective("moco", MOCO)
    loss = moco.loss(features(moco.requests(), 0), batch(0), None).value
    assert loss == 0
    moco.after_step(0)
    assert moco.loss(features(moco.requests(), 1), batch(1), None).value > 0.1


def test_a_damaged_row_is_neither_query_nor_key():
    moco, weight = objective("moco", MOCO), torch.ones(ROWS)
    weight[2] = 0
    for step in range(3):
        given = features(moco.requests(), step)
        result = moco.loss(given, batch(step, weight), None)
        result.value.backward()
        assert torch.isfinite(result.value)
        assert all(torch.isfinite(torch.as_tensor(s)) for s in result.signals.values())
        assert not given[moco.query].grad[2].any()
        moco.after_step(step)
    assert (moco.queue.rows().any(1).sum()) == 3 * (ROWS - 1)


def test_dino_is_lightlys_dino():
    dino = objective("dino", DINO)
    theirs = DINOLoss(output_dim=20, warmup_teacher_temp=0.04, teacher_temp=0.04)
    for step in range(4):
        given = features(dino.requests(), step)
        student, taught = dino._outputs(given)
        expected = theirs(list(taught), list(student))
        torch.testing.assert_close(dino.loss(given, batch(step), None).value, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dino.center, theirs.center.flatten(), rtol=1e-6, atol=1e-7)


def test_dino_schedules():
    dino = objective("dino", DINO | {"teacher_temperature_start": 0.02, "teacher_temperature_warmup_steps": 5})
    assert [dino.teacher_temperature(s) for s in (0, 2, 4, 5, 50)] == pytest.approx([0.02, 0.03, 0.04, 0.04, 0.04])
    assert dino.teacher_momentum(0) == pytest.approx(0.996)
    assert dino.teacher_momentum(50) == pytest.approx(0.998)
    assert dino.teacher_momentum(100) == pytest.approx(1.0)


def test_dinos_prototypes_begin_as_short_as_the_official_ones():
    """They are scored as unit rows, so under AdamW their length is how slowly they turn."""
    lengths = objective("dino", DINO | {"prototypes": 400, "bottleneck": 64}).head.prototypes.norm(dim=1)
    assert lengths.mean().item() == pytest.approx(3**-0.5, rel=0.05)


def test_the_views_are_the_official_ones():
    views = objective("dino", DINO).image_views(32)
    assert [(v.size, v.solarize, v.blur.p) for v in views] == [
        (32, 0.0, 1.0), (32, 0.2, 0.1), (8, 0.0, 0.5), (8, 0.0, 0.5), (8, 0.0, 0.5),
    ]  # fmt: skip


def test_frozen_prototypes_take_no_gradient():
    dino = objective("dino", DINO | {"freeze_steps": 2})
    for step, trained in ((0, False), (1, False), (2, True)):
        dino.before_step(step)
        dino.zero_grad()
        dino.loss(features(dino.requests(), step), batch(step), None).value.backward()
        assert (dino.head.prototypes.grad is not None) == trained


def test_collapse_is_told():
    dino, moco = objective("dino", DINO), objective("moco", MOCO)
    healthy = {"loss_over_chance": 0.5, "teacher_entropy": 0.3, "teacher_use": 0.9, "loss": 1.0}
    assert dino.warnings(healthy, 10_000) == []
    assert "lower teacher_temperature" in dino.warnings(healthy | {"teacher_entropy": 1.0}, 10_000)[0]
    assert "center_momentum" in dino.warnings(healthy | {"teacher_use": 0.01}, 10_000)[0]
    assert moco.warnings({"positive": 0.9, "accuracy": 0.5, "loss": 1.0}, 1000) == []
    assert "one point" in moco.warnings({"positive": 1.0, "accuracy": 0.0, "loss": 1.0}, 1000)[0]
