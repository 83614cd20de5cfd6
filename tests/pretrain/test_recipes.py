"""The published recipes: their backbones, steps and schedules are what the sources say, and their objectives build."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch

import recipes
from pretrain.models.trunk import Trunk
from pretrain.objectives import build
from pretrain.objectives.base import RunFacts
from pretrain.optim.schedule import rates_at
from pretrain.recipe import Recipe, load_recipe, shipped_recipes

IMAGENET, CIFAR = 1_281_167, 50_000

PUBLISHED = {
    # name: (backbone's parameters, how near we must be, epochs, images, global batch)
    "swav-r50-100ep": (23_508_032, 0, 100, IMAGENET, 4096),
    "swav-r50-200ep": (23_508_032, 0, 200, IMAGENET, 4096),
    "swav-r50-400ep": (23_508_032, 0, 400, IMAGENET, 4096),
    "swav-r50-800ep": (23_508_032, 0, 800, IMAGENET, 4096),
    "swav-r50-200ep-256": (23_508_032, 0, 200, IMAGENET, 256),
    "swav-r50-400ep-256": (23_508_032, 0, 400, IMAGENET, 256),
    "swav-r50-400ep-2x224": (23_508_032, 0, 400, IMAGENET, 4096),
    "swav-w2-400ep": (94_000_000, 500_000, 400, IMAGENET, 4096),
    "swav-w4-400ep": (375_000_000, 500_000, 400, IMAGENET, 2560),
    "swav-w5-400ep": (586_000_000, 500_000, 400, IMAGENET, 1536),
    "moco-v2-r50-200ep": (23_508_032, 0, 200, IMAGENET, 256),
    "hydra-r50-imagenet": (23_508_032, 0, 1000, IMAGENET, 512),
    "hydra-r18-cifar10": (11_300_000, 50_000, 1000, CIFAR, 512),  # no published figure: timm's, deep stem
    "dino-vit-s16": (21_665_664, 0, 100, IMAGENET, 512),
}


@cache
def trunk(name: str) -> Trunk:
    """Without memory: w5 has 586 M parameters."""
    with torch.device("meta"):
        return Trunk(load_recipe(name).model)


def text(name: str) -> str:
    return (Path(recipes.__path__[0]) / f"{name}.yaml").read_text()


def epoch(name: str) -> int:
    """Steps an epoch: whole batches only."""
    *_, images, batch = PUBLISHED[name]
    return images // batch


def test_every_published_recipe_is_shipped_and_compared():
    assert set(shipped_recipes()) - {"demo", "images", "photographs"} == set(PUBLISHED)


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_trunk_builds(name: str):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert trunk(name).embed_dim == (recipe.model.embed_dim or trunk(name).pooled_dim)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_backbone_has_the_published_size(name: str):
    published, within, *_ = PUBLISHED[name]
    built = sum(p.numel() for p in trunk(name).image.parameters())
    assert abs(built - published) <= within
    if "Backbone:" in text(name):
        assert f"# Backbone: {built:,} parameters" in text(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_steps_are_the_stated_epochs(name: str):
    _, _, epochs, images, batch = PUBLISHED[name]
    recipe = load_recipe(name)
    assert recipe.global_batch == batch
    assert recipe.total_steps(images) == epochs * (images // batch)
    stated = re.search(r"^# Steps: (\d+) epochs of (\d+), the whole batches of ([\d,]+) images", text(name), re.M)
    assert stated is not None
    assert [int(n.replace(",", "")) for n in stated.groups()] == [epochs, epoch(name), images]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_header_tells_what_a_reader_needs(name: str):
    header = text(name).split("\nname:")[0]
    assert f"accelerate launch -m pretrain {name} " in header
    for said in ("Source:", "Needs:", "Expected:", "Steps:", "unconfirmed:"):
        assert f"\n# {said}" in header, said


def rates(recipe: Recipe, step: int) -> tuple[float, float]:
    assert recipe.steps is not None
    return tuple(rates_at(step, recipe.steps, recipe))


@pytest.mark.parametrize("name", [n for n in PUBLISHED if n.startswith("swav")])
def test_swavs_rates_and_waits(name: str):
    recipe, small = load_recipe(name), "-256" in name
    peak, start, last = (0.6, 0.6, 6e-4) if small else (4.8, 0.3, 4.8e-3)
    if "w5" in name:
        start, last = 0.1875, 0.0
    warm = 0 if small else 10 * epoch(name)
    assert recipe.schedule.warmup_steps == warm
    assert rates(recipe, 0) == pytest.approx((start, 1e-6))
    assert rates(recipe, warm) == pytest.approx((peak, 1e-6))
    assert rates(recipe, recipe.steps)[0] == pytest.approx(last)
    options = recipe.objectives["swav"]
    assert options["freeze_steps"] == (5005 if small else 313)
    assert options["queue"] == {"-256": 3840, "w4": 2560, "w5": 1536}.get(
        next((k for k in ("-256", "w4", "w5") if k in name), ""), 0
    )
    assert options["queue_from_step"] == (15 * epoch(name) if small else 0)
    assert options["queue"] % recipe.global_batch == 0


def test_dinos_rates():
    recipe = load_recipe("dino-vit-s16")
    assert rates(recipe, 0) == pytest.approx((0.0, 0.04))
    assert rates(recipe, 10 * epoch("dino-vit-s16"))[0] == pytest.approx(0.0005 * 512 / 256)
    assert rates(recipe, recipe.steps) == pytest.approx((1e-6, 0.4))
    assert recipe.objectives["dino"]["freeze_steps"] == epoch("dino-vit-s16")


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_objectives_build(name: str):
    recipe = load_recipe(name)
    with torch.device("meta"):
        facts = RunFacts(
            pooled_dim=trunk(name).pooled_dim,
            global_batch=recipe.global_batch,
            total_steps=recipe.total_steps(IMAGENET),
            samples=IMAGENET,
            seed=recipe.seed,
        )
        built = build(recipe.objectives, facts)
    views = [view for objective in built.values() for view in objective.image_views(recipe.model.image_size)]
    assert len({view.name for view in views}) == len(views) > 0
