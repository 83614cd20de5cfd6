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
YFCC, LAION = 14_829_396, 407_332_084

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


PAIRS = {
    # name: (open_clip's architecture or None, parameters of trunk and temperature, weight decay, global batch,
    #        pairs an epoch, steps)
    "clip-r50-cc3m": ("RN50", 102_007_137, 0.1, 1024, 2_806_772, 82_230),
    "clip-r50-cc12m": ("RN50", 102_007_137, 0.1, 1024, 10_062_127, 314_442),
    "clip-r50-yfcc15m": ("RN50", 102_007_137, 0.1, 1024, YFCC, 463_419),
    "clip-r50-yfcc15m-openai": ("RN50", 102_007_137, 0.2, 32768, YFCC, 14_482),
    "clip-vit-s16-yfcc15m-slip": (None, 85_290_369, 0.5, 4096, YFCC, 90_512),
    "clip-vit-b16-yfcc15m-slip": (None, 149_619_969, 0.5, 4096, YFCC, 90_512),
    "clip-vit-b32-laion400m": ("ViT-B-32", 151_277_313, 0.2, 32768, LAION, 397_792),
    "clip-vit-b16-laion400m": ("ViT-B-16", 149_620_737, 0.2, 33792, LAION, 385_760),
    "clip-vit-l14-laion400m": ("ViT-L-14", 427_616_513, 0.2, 38400, LAION, 339_456),
    "clip-vit-b32-laion2b": ("ViT-B-32", 151_277_313, 0.2, 79104, LAION, 439_040),
    "clip-vit-l14-laion2b": ("ViT-L-14", 427_616_513, 0.2, 86016, LAION, 372_160),
    "clip-vit-h14-laion2b": ("ViT-H-14", 986_109_441, 0.2, 79104, LAION, 439_040),
    "clip-vit-g14-laion2b": ("ViT-g-14", 1_366_678_273, 0.2, 64000, LAION, 190_800),
    "clip-vit-bigg14-laion2b": ("ViT-bigG-14", 2_539_567_105, 0.2, 160000, LAION, 244_224),
    "clip-vit-b16-datacomp1b": ("ViT-B-16", 149_620_737, 0.2, 90112, LAION, 142_046),
    "clip-vit-l14-datacomp1b": ("ViT-L-14", 427_616_513, 0.2, 90112, LAION, 142_046),
    "clip-convnext-tiny-cc12m": ("convnext_tiny", 92_296_801, 0.2, 1280, 10_062_127, 251_554),
    "siglip-convnext-tiny-cc12m": ("convnext_tiny", 92_296_802, 0.2, 1280, 10_062_127, 251_554),
    # with the region branch, and in ViTs the neighbours' convolutions: no peer builds the same
    "pyramidclip-r50-yfcc15m": (None, None, 0.2, 4096, YFCC, 115_855),
    "pyramidclip-vit-b32-yfcc15m": (None, None, 0.2, 4096, YFCC, 115_855),
    "pyramidclip-vit-b16-yfcc15m": (None, None, 0.2, 4096, YFCC, 115_855),
}
"""Recipes on images and texts. Those on LAION and DataComp count steps, whatever an epoch has."""


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
    own = {"demo", "images", "photographs", "learning"}
    assert set(shipped_recipes()) - own == set(PUBLISHED) | set(PAIRS)


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


@pytest.mark.parametrize("name", [*PUBLISHED, *PAIRS])
def test_the_header_tells_what_a_reader_needs(name: str):
    header = text(name).split("\nname:")[0]
    assert f"accelerate launch -m pretrain {name} " in header
    for said in ("Source:", "Needs:", "Expected:", "Steps:", "unconfirmed:"):
        assert f"\n# {said}" in header, said


def own_parameters(name: str) -> int:
    """Of the objectives: a temperature, and SigLIP's bias."""
    recipe = load_recipe(name)
    facts = RunFacts(trunk(name).pooled_dim, recipe.global_batch, 1000, YFCC, seed=0, regions=recipe.model.regions)
    return sum(p.numel() for o in build(recipe.objectives, facts).values() for p in o.parameters())


@cache
def peer(architecture: str) -> int:
    """Parameters of open_clip's own class, without memory."""
    import open_clip

    config = open_clip.get_model_config(architecture)
    config.pop("custom_text", None)
    with torch.device("meta"):
        return sum(p.numel() for p in open_clip.CLIP(**config).parameters())


@pytest.mark.parametrize("name", [n for n, (_, size, *_) in PAIRS.items() if size])
def test_the_towers_have_the_published_size(name: str):
    architecture, size, *_ = PAIRS[name]
    assert sum(p.numel() for p in trunk(name).parameters()) + own_parameters(name) == size
    if architecture:
        assert peer(architecture) == size - own_parameters(name) + 1  # open_clip's temperature


@pytest.mark.parametrize("name", PAIRS)
def test_the_steps_of_pairs_are_the_stated_ones(name: str):
    *_, decay, batch, pairs, steps = PAIRS[name]
    recipe = load_recipe(name)
    assert (recipe.global_batch, recipe.optimizer.weight_decay) == (batch, decay)
    assert recipe.total_steps(pairs) == steps
    assert rates_at(recipe.schedule.warmup_steps, steps, recipe).lr == recipe.optimizer.lr
    assert rates_at(0, steps, recipe).lr <= recipe.optimizer.lr / 500
    stated = re.search(r"^# Steps: (\d+) epochs of (\d+), ([\d,]+) pairs each", text(name), re.M)
    if stated is not None:
        epochs, each, drawn = (int(n.replace(",", "")) for n in stated.groups())
        assert steps == epochs * each
        assert each == -(-drawn // batch)
    elif recipe.steps is None:
        assert f"{pairs:,}" in text(name)
        assert f"{steps:,} steps" in text(name)


def test_b16_plus_is_the_same_recipe_with_what_its_header_says():
    changes = re.findall(r"(?:model|global_batch|steps)[\w.]*=[\w.]+", text("clip-vit-b16-laion400m").split("name:")[0])
    recipe = load_recipe("clip-vit-b16-laion400m", [change.rstrip(".") for change in changes])
    with torch.device("meta"):
        built = sum(p.numel() for p in Trunk(recipe.model).parameters()) + 1
    assert built == peer("ViT-B-16-plus-240")
    assert recipe.steps == 32 * -(-LAION // recipe.global_batch)


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
            regions=recipe.model.regions,
        )
        built = build(recipe.objectives, facts)
    views = [view for objective in built.values() for view in objective.image_views(recipe.model.image_size)]
    assert len({view.name for view in views}) == len(views) > 0
