"""The learning rate and the groups of the optimizer, beside open_clip's."""

from __future__ import annotations

import pytest
import torch

from pretrain.models.trunk import build_trunk
from pretrain.optim.adamw import build_adamw, set_lr
from pretrain.optim.schedule import lr_at
from pretrain.recipe import OptimizerRecipe, ScheduleRecipe, parse_recipe
from tests.tiny import VIT, recipe_data


def test_the_schedule_is_open_clips():
    scheduler = pytest.importorskip("open_clip_train.scheduler")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = scheduler.cosine_lr(optimizer, 0.5, 7, 50)
    for step in range(50):
        theirs(step)
        assert lr_at(step, 50, 0.5, ScheduleRecipe(warmup_steps=7)) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_the_schedule_rises_to_the_peak_and_ends_at_its_share():
    recipe = ScheduleRecipe(warmup_steps=4, final=0.1)
    rates = [lr_at(step, 100, 2.0, recipe) for step in range(101)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[52] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[100] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_matrices_are_decayed_and_vectors_are_not():
    trunk = build_trunk(parse_recipe(recipe_data("s", "r", model=VIT), "test").model, seed=0)
    named = {**dict(trunk.named_parameters()), "logit_scale": torch.nn.Parameter(torch.zeros(1))}
    optimizer = build_adamw(named, OptimizerRecipe(weight_decay=0.3))
    set_lr(optimizer, 0.25)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(named.values())
    for name, p in named.items():
        vector = p.ndim < 2 or "cls_token" in name
        assert decay[p] == (0.0 if vector else 0.3), name
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
