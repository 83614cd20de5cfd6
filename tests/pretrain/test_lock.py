"""Locked towers: which weights learn, with which gradients, on how many ranks, and that nothing else moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.models.lock import lock
from pretrain.models.request import FeatureRequest
from pretrain.models.trunk import Trunk, build_trunk
from pretrain.parts import Parts, assemble
from pretrain.recipe import LockRecipe, ModelRecipe, parse_recipe
from pretrain.replay import replay
from pretrain.telemetry import read_log
from tests.pretrain.test_step import ROWS, dense, global_batch, gradients
from tests.ranks import run_ranks
from tests.runs import train, train_here, weights
from tests.tiny import RESNET, VIT, recipe_data, write_recipe, write_shards

PAIR = [FeatureRequest("image", "clip"), FeatureRequest("text", "caption")]
LOCKS = {
    "image": {"image": True},
    "image and projection": {"image": True, "projection": True},
    "last block": {"image": True, "image_unlocked": 1},
    "text": {"text": True},
    "last block of both": {"image": True, "image_unlocked": 1, "text": True, "text_unlocked": 1},
    "but the projection": {"image": True, "text": True},
    "patches": {"patches": True},
}


def learns(locked: dict, name: str) -> bool:
    """The rule, by name, of a tower of two blocks."""
    side, last = name.split(".")[0], name.split(".")[1]
    if name == "image.projection.weight":
        return not locked.get("projection", False)
    if locked.get("patches") and ".patch_embed." in name:
        return False
    if not locked.get(side):
        return True
    if not locked.get(f"{side}_unlocked"):
        return False
    return ".blocks.1." in f".{name}" or ".norm." in f".{name}" or last == "projection"


def parts_of(model: dict, rank: int = 0, world: int = 1, accumulation: int = 1, **changes) -> Parts:
    data = recipe_data("shards", "run", model=model, global_batch=ROWS, accumulation=accumulation, seed=1, **changes)
    return assemble(parse_recipe(data, "test"), 240, Process(rank, world, 0, torch.device("cpu")))


@pytest.mark.parametrize("locked", LOCKS.values(), ids=LOCKS)
def test_what_is_locked_takes_no_gradient(locked):
    trunk = parts_of(VIT | {"lock": locked}).backend.trunk
    found = {n: p.requires_grad for n, p in trunk.named_parameters()}
    assert found == {n: learns(locked, n) for n in found}


@pytest.mark.parametrize(
    ("model", "kwargs", "trained"),
    [
        ("test_resnet", {}, {"layer4"}),
        ("test_convnext", {}, {"stages.3", "norm_pre", "head"}),
        ("resnet50_clip", {}, {"stages.3", "head"}),
        ("vit_tiny_patch16_224", VIT["image_kwargs"] | {"global_pool": "map"}, {"blocks.1", "norm", "attn_pool"}),
        ("test_efficientnet", {}, {"blocks.4", "conv_head", "bn2"}),
    ],
)
def test_the_last_stage_of_any_tower_can_learn_with_what_stands_behind_it(model, kwargs, trained):
    recipe = ModelRecipe(image=model, image_size=32, image_kwargs=kwargs, text=None, embed_dim=8)
    trunk = build_trunk(recipe, seed=0)
    lock(trunk, LockRecipe(image=True, image_unlocked=1), PAIR[:1])
    for name, p in trunk.image.backbone.named_parameters():
        assert p.requires_grad == any(name.startswith(f"{part}.") for part in trained), name


def test_clips_own_resnet_keeps_its_pool_and_trains_the_projection_in_it():
    recipe = ModelRecipe(image="resnet50_clip", image_size=32, text=None, embed_dim=8)
    for projection, trained in (
        (False, ["image.backbone.head.proj.weight", "image.backbone.head.proj.bias"]),
        (True, []),
    ):
        trunk = build_trunk(recipe, seed=0)
        both = [*PAIR[:1], FeatureRequest("image", "clip", "pooled")]
        if projection:
            with pytest.raises(UserError, match="nothing that the objectives read is trained"):
                lock(trunk, LockRecipe(image=True, projection=True), both)
        else:
            lock(trunk, LockRecipe(image=True), both)
        assert [n for n, p in trunk.named_parameters() if p.requires_grad] == trained


# ----------------------------------------------------------------------------- gradients

CASES = [(name, accumulation) for name in LOCKS for accumulation in (1, 2)]


def all_gradients(rank: int, world: int) -> list[dict[str, torch.Tensor]]:
    return [gradients(rank, world, VIT | {"lock": LOCKS[name]}, accumulation) for name, accumulation in CASES]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_learns_has_the_gradients_of_the_unlocked_run(world):
    """No dropout and no BatchNorm here: a locked tower computes what it computed before."""
    everything = dense(VIT)
    ranks = run_ranks(all_gradients, world) if world > 1 else [all_gradients(0, 1)]
    for found_all in ranks:
        for (name, accumulation), found in zip(CASES, found_all, strict=True):
            expected = {n: g for n, g in everything.items() if "." not in n or learns(LOCKS[name], n)}
            assert found.keys() == expected.keys(), (name, accumulation)
            for n, gradient in expected.items():
                scale = gradient.abs().max().clamp(min=1e-6)
                assert (found[n] - gradient).abs().max() / scale < 1e-10, (name, accumulation, n)


@pytest.mark.parametrize(
    ("locked", "passes"),
    [
        ({}, 8),
        ({"image": True}, 4),
        ({"image": True, "projection": True}, 4),
        ({"image": True, "image_unlocked": 1}, 8),
    ],
)
def test_a_locked_tower_runs_once_a_micro_batch(monkeypatch, locked, passes):
    parts = parts_of(VIT | {"lock": locked}, accumulation=4)
    backbone, seen = parts.backend.trunk.image.backbone, []
    inner = backbone.forward_features
    monkeypatch.setattr(backbone, "forward_features", lambda x: (seen.append(len(x)), inner(x))[1])
    parts.two_stage(global_batch(VIT["image_size"]))
    assert seen == [ROWS // 4] * passes


# ----------------------------------------------------------------------------- standing still


def statistics(trunk: Trunk) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in trunk.named_buffers()}


@pytest.mark.parametrize(("unlocked", "moving"), [(0, set()), (1, {"layer4"})])
def test_a_locked_batchnorm_stands_still_and_nothing_is_dropped(unlocked, moving):
    model = RESNET | {"lock": {"image": True, "image_unlocked": unlocked}}
    parts = parts_of(model)
    trunk = parts.backend.trunk
    trunk.eval()
    trunk.train()
    before = statistics(trunk)
    parts.two_stage(global_batch(model["image_size"]))
    after = statistics(trunk)
    assert {n.split(".")[2] for n in before if not torch.equal(before[n], after[n])} == moving
    if not unlocked:  # dropout is in the last layers: with all of it locked, training is evaluation
        x = {PAIR[0]: global_batch(model["image_size"]).images["clip"]}
        trained = trunk(x)[PAIR[0]]
        torch.testing.assert_close(trained, trunk.eval()(x)[PAIR[0]], rtol=0, atol=0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


LAST = {"image": True, "image_unlocked": 1, "text": True, "text_unlocked": 1}


def run(shards: Path, folder: Path, name: str, model: dict, **changes) -> Path:
    """Two micro-batches a step, an average, and one rate at every length, so that a cut run can go on as the whole."""
    changes = {"model": model, "accumulation": 2, "schedule": {"final": 1.0}, "ema": {"decay": 0.9}} | changes
    return write_recipe(folder / f"{name}.yaml", recipe_data(shards, folder / name, **changes))


def test_locked_weights_are_bit_equal_after_training_and_the_rest_resumes(tmp_path, shards):
    model = RESNET | {"lock": LAST}
    assert train_here(run(shards, tmp_path, "whole", model, steps=6)) == 0
    for steps in (3, 6):
        assert train_here(run(shards, tmp_path, "cut", model, steps=steps)) == 0
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert [n for n in whole if not torch.equal(whole[n], cut[n])] == []
    check_locked(whole, model, {"image.backbone.layer4", "image.projection", *TEXT_END})


def test_two_ranks_lock_alike_and_replay(tmp_path, shards):
    """BatchNorm that stands still does not tie the ranks' rows together, so every rank's dropout comes back too."""
    model = RESNET | {"lock": {"image": True}, "text": RESNET["text"] | {"dropout": 0.2}}
    train(str(run(shards, tmp_path, "two", model, steps=3, world=2, checkpoint={"every": 1})))
    check_locked(weights(tmp_path / "two"), model, {"image.projection", "text"})
    logged = {line["step"]: line["loss"] for line in read_log(tmp_path / "two")}
    assert float(replay(tmp_path / "two", 3).total().mean()) == pytest.approx(logged[3], rel=1e-5)


TEXT_END = ("text.blocks.1", "text.norm", "text.projection")


def check_locked(found: dict[str, torch.Tensor], model: dict, learning: set[str]) -> None:
    """What is locked is the seed's, in the average too; only what learns has an optimizer's state."""
    first = build_trunk(ModelRecipe(**model), seed=0)
    weight = dict(first.named_parameters())
    trained = {n for n in weight if n.startswith(tuple(f"{part}." for part in learning))}
    assert {n for n in weight if not torch.equal(found[f"model.{n}"], weight[n])} == trained
    assert all(torch.equal(found[f"ema.{n}"], weight[n]) for n in weight.keys() - trained)
    assert {n.removeprefix("optim.").rpartition(".")[0] for n in found if n.startswith("optim.")} == trained
    standing = {n: b for n, b in first.named_buffers() if not n.startswith(tuple(learning))}
    assert standing
    assert all(torch.equal(found[f"model.{n}"], b) for n, b in standing.items())


# ----------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("locked", "changes", "message"),
    [
        ({"image": True, "projection": True, "text": True}, {}, "nothing that the objectives read is trained"),
        ({"image": True}, {"embed_dim": None, "text": None}, "nothing that the objectives read is trained"),
        ({"image_unlocked": 1}, {}, "image_unlocked without model.lock.image"),
        ({"projection": True}, {}, "projection without model.lock.image"),
        ({"text_unlocked": 1}, {}, "text_unlocked without model.lock.text"),
        ({"text": True}, {"text": None}, "model.text: null"),
        ({"image": True, "projection": True}, {"embed_dim": None}, "embed_dim: null makes none"),
        ({"image": True, "image_unlocked": 3}, {}, "image_unlocked 3: vit_tiny_patch16_224 has 2 blocks"),
        ({"text": True, "text_unlocked": 3}, {}, "text_unlocked 3: the text tower has 2 blocks"),
        ({"image": True, "image_unlocked": 1}, {"image": "regnety_002", "image_kwargs": {}}, "no blocks or stages"),
        ({"patches": True}, {"image": "test_resnet", "image_kwargs": {}}, "test_resnet has no patch embedding"),
    ],
)
def test_what_cannot_be_locked_is_refused_by_name(locked, changes, message):
    trunk = build_trunk(ModelRecipe(**(VIT | changes)), seed=0)
    with pytest.raises(UserError, match=message):
        lock(trunk, LockRecipe(**locked), PAIR[:1] if trunk.text is None else PAIR)


def test_a_run_whose_objectives_read_locked_features_alone_is_refused():
    """The text tower is open, but nothing reads it."""
    with pytest.raises(UserError, match="nothing that the objectives read is trained"):
        parts_of(VIT | {"lock": {"image": True}}, objectives={"moco": {"dim": 6, "hidden": 10, "queue": 24}})
