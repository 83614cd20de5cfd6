"""The certificate: its reference is the textbook's, what is sound passes, what is broken under it fails by name."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from unittest.mock import patch

import pytest
import torch

from pretrain.backends.ddp import DDP
from pretrain.backends.replicated import Replicated
from pretrain.certify.cells import BAR, Cell, certify_world
from pretrain.certify.peers import peers_at
from pretrain.certify.reference import reference, references
from pretrain.certify.shrink import SAMPLES, STEPS, shrink
from pretrain.certify.table import Certificate
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.models.trunk import Trunk
from pretrain.objectives import build
from pretrain.objectives.base import Loss, RunFacts
from pretrain.objectives.clip import Clip
from pretrain.objectives.functional import contrastive
from pretrain.recipe import Recipe, dump_recipe, load_recipe, parse_recipe, shipped_recipes
from tests.ranks import run_ranks
from tests.runs import start
from tests.tiny import RESNET, VIT, recipe_data, write_recipe

EVERY_OBJECTIVE = (
    "clip-vit-b32-laion400m", "siglip-convnext-tiny-cc12m", "pyramidclip-vit-b16-yfcc15m", "swav-r50-200ep-256",
    "hydra-r18-cifar10", "moco-v2-r50-200ep", "dino-vit-s16",
)  # fmt: skip


def small(**changes) -> Recipe:
    return shrink(parse_recipe(recipe_data("shards", "run", **{"model": VIT} | changes), "test"))[0]


BATCHNORM = small(model=RESNET | {"image_kwargs": {}})


def expected_of(recipe: Recipe) -> dict:
    return {name: dict(found) for name, found in references(recipe, [1, 2, 3], [1, 4])[0].items()}


# ---- the reference


@pytest.mark.parametrize("name", EVERY_OBJECTIVE)
def test_in_float64_every_objective_is_the_textbooks(name):
    found = reference(shrink(load_recipe(name))[0], torch.float32)
    assert found.source.startswith("the textbook's formula")
    assert all(g.dtype == torch.float64 and g.isfinite().all() for g in found.gradients.values())
    for part in ("image.", "objective."):  # heads and temperatures are trained: not frozen, no empty queue
        assert any(g.any() for n, g in found.gradients.items() if n.startswith(part))


def test_a_loss_that_is_not_the_textbooks_is_told():
    def heavier(objective, features, batch, group) -> Loss:
        return Loss(1.01 * loss(objective, features, batch, group).value)

    loss = Clip.loss
    with patch.object(Clip, "loss", heavier), pytest.raises(UserError, match=r"is 1.0e-02 off the textbook's formula"):
        reference(small(), torch.float32)


# ---- the recipe made small


def test_every_shipped_recipe_is_made_small_and_stays_what_it_is():
    for name in shipped_recipes():
        recipe = load_recipe(name)
        made, _ = shrink(recipe)
        assert parse_recipe(json.loads(made.model_dump_json()), name) == made, dump_recipe(made)
        assert made.objectives.keys() == recipe.objectives.keys()
        assert (made.model.image, made.model.text is None) == (recipe.model.image, recipe.model.text is None)
        with torch.device("meta"):
            trunk = Trunk(made.model)
            build(made.objectives, RunFacts(trunk.pooled_dim, 24, STEPS, SAMPLES, 0, regions=made.model.regions))
        assert sum(p.numel() for p in trunk.parameters()) < 1e6, name


# ---- what is broken is found


def scaled(world: int):
    """A backend whose gradients are 1/W of what they should be."""
    gradients = DDP.gradients
    return patch.object(DDP, "gradients", lambda self: {n: g / world for n, g in gradients(self).items()})


def objectives_not_reduced(world: int):
    return patch.object(Replicated, "reduce", lambda self, loss: loss)


def ranks_in_another_order(world: int):
    gather = contrastive.all_gather_rows
    return patch.object(contrastive, "all_gather_rows", lambda x, *args: gather(x, *args).roll(len(x), 0))


BROKEN = {
    "as it is": lambda world: nullcontext(),
    "scaled": scaled,
    "objectives not reduced": objectives_not_reduced,
    "ranks in another order": ranks_in_another_order,
}


def run_broken(rank: int, world: int, folder: str) -> dict:
    expected, in_parts = torch.load(f"{folder}/expected.pt")
    process = Process(rank, world, rank, torch.device("cpu"))
    found = {}
    for name, broken in BROKEN.items():
        with broken(world):
            found[name] = [asdict(c) for c in certify_world(process, small(), expected, ["ddp"], [1, 4])]
    for name in ("as it is", "scaled"):
        with BROKEN[name](world):
            cells = certify_world(process, BATCHNORM, in_parts, ["ddp"], [4])
        found[f"batchnorm {name}"] = [asdict(c) for c in cells]
    return {"cells": found, "peers": [asdict(p) for p in peers_at(process, ["clip", "siglip", "swav"])]}


@pytest.fixture(scope="module", params=[2, 3])
def broken(request, tmp_path_factory) -> tuple[int, dict]:
    folder = tmp_path_factory.mktemp("expected")
    torch.save((expected_of(small()), expected_of(BATCHNORM)), folder / "expected.pt")
    ranks = run_ranks(run_broken, request.param, str(folder))
    assert all(r["cells"] == ranks[0]["cells"] for r in ranks)
    return request.param, ranks[0]


def certificate(cells: list[dict]) -> Certificate:
    return Certificate("test", {"reference": "", "made small": []}, [Cell(**c) for c in cells], [])


def test_a_sound_backend_passes(broken):
    world, found = broken
    made = certificate(found["cells"]["as it is"])
    assert made.passed
    assert [(c.world, c.accumulation, c.verdict) for c in made.cells] == [(world, 1, "PASS"), (world, 4, "PASS")]
    assert all(0 < c.figure <= BAR for c in made.cells)


@pytest.mark.parametrize(
    ("what", "parameters"),
    [
        ("scaled", ("image.", "text.")),
        ("objectives not reduced", ("objective.clip.logit_scale",)),
        ("ranks in another order", ("image.", "text.", "objective.")),
    ],
)
def test_what_is_broken_fails_and_is_named(broken, what, parameters):
    world, found = broken
    made = certificate(found["cells"][what])
    assert not made.passed
    for cell in made.cells:
        assert cell.verdict == "FAIL"
        assert cell.figure > 100 * BAR
        assert cell.parameter.startswith(parameters)
        assert f"FAIL ddp, world {world}, accumulation {cell.accumulation}: {cell.parameter}" in made.text()


def test_a_gradient_of_one_wth_is_told_as_such(broken):
    world, found = broken
    assert found["cells"]["scaled"][0]["figure"] == pytest.approx(1 - 1 / world, abs=1e-4)


# ---- the peers


def test_the_peers_losses_are_told_by_how_far_they_are_off(broken):
    world, found = broken
    figures = {p["name"]: p["figure"] for p in found["peers"]}
    assert figures["open_clip ClipLoss, as its flags are by default"] == pytest.approx(1 - 1 / world, abs=1e-4)
    assert figures["lightly SwaVLoss, as its flags are by default"] > 0.01  # each rank balances its own rows
    right = {n: f for n, f in figures.items() if "as its flags are" not in n}
    assert len(right) == 7
    assert max(right.values()) < BAR, right


# ---- approximations and refusals


def test_batchnorm_in_parts_is_an_approximation_and_rounding_is_told_from_error():
    recipe = shrink(load_recipe("learning"))[0]
    one, four = certify_world(Process(0, 1, 0, torch.device("cpu")), recipe, expected_of(recipe), ["ddp"], [1, 4])
    assert (one.verdict, four.verdict) == ("PASS", "approx")
    for cell in (one, four):
        assert cell.figure <= BAR or cell.figure64 < 1e-9
    assert four.away > 1e-3
    assert f"approx ({four.away:.0e})" in certificate([asdict(one), asdict(four)]).text()


def test_an_approximation_is_held_to_its_own_parts(broken):
    _, found = broken
    (sound,), (wrong,) = found["cells"]["batchnorm as it is"], found["cells"]["batchnorm scaled"]
    assert sound["verdict"] == "approx", sound
    assert sound["away"] > 1e-3
    assert wrong["verdict"] == "FAIL"
    assert wrong["figure64"] > 100 * BAR


def test_the_verb_writes_the_certificate_and_says_it_with_its_exit_code(tmp_path):
    data = recipe_data("no shards", tmp_path / "run", model=VIT, optimizer={"name": "lars"})
    recipe = write_recipe(tmp_path / "r.yaml", data)
    process = start("certify", str(recipe), "--worlds", "2", "--backends", "ddp", "zero1")
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    kept = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert kept["passed"]
    assert torch.__version__.startswith(kept["versions"]["torch"])
    assert [(c["backend"], c["verdict"]) for c in kept["cells"]] == [
        ("ddp", "PASS"), ("ddp", "PASS"), ("zero1", "refused"), ("zero1", "refused"),
    ]  # fmt: skip
    text = (tmp_path / "run" / "certificate.txt").read_text()
    assert "PASS: gradients of tiny" in text
    assert "zero1 is refused, as in training: optimizer lars looks at whole tensors" in text


def test_a_world_that_does_not_divide_the_batch_is_refused(tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", recipe_data("no shards", tmp_path / "run"))
    process = start("certify", str(recipe), "--worlds", "5")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "--worlds 5: 24 rows do not divide into 5 x 4 parts" in told
