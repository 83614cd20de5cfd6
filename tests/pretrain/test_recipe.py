"""The recipe: what it takes, what it refuses, and how it says so."""

from __future__ import annotations

import pytest

from pretrain.errors import UserError
from pretrain.objectives import build, known
from pretrain.recipe import dump_recipe, load_recipe, parse_recipe
from tests.tiny import FACTS

MINIMAL = {"name": "t", "output": "runs/t", "steps": 10, "global_batch": 8, "data": {"sources": ["a"]}}


def refused(**changes) -> str:
    with pytest.raises(UserError) as error:
        parse_recipe(MINIMAL | changes, "t.yaml")
    return str(error.value)


def test_known_objectives_are_objectives():
    needed: dict = {"hydra": {"classes": 3}, "moco": {"queue": 24}, "pyramid_clip": {"regions": False}}
    for name in known():
        assert build({name: needed.get(name, 1.0)}, FACTS)
    with pytest.raises(UserError, match="no objective 'contrastive'"):
        build({"contrastive": 1.0}, FACTS)


def test_a_bare_path_is_a_source():
    assert parse_recipe(MINIMAL, "t").data.sources[0].shards == "a"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"gobal_batch": 4}, "did you mean global_batch?"),
        ({"optimizer": {"learning": 1}}, "unknown key optimizer.learning"),
        ({"optimizer": {"weight_dcay": 1}}, "did you mean weight_decay?"),
        ({"model": {"text": {"layer": 2}}}, "did you mean layers?"),
        ({"data": {"sources": [{"shards": "a", "wieght": 1}]}}, "did you mean weight?"),
        ({"global_batch": "many"}, "global_batch"),
        ({"precision": "fp8"}, "precision"),
        ({"world": 3}, "try 6 or 9"),
        ({"world": 2, "accumulation": 3}, "try 6 or 12"),
        ({"epochs": 2}, "either steps or epochs"),
        ({"model": {"text": {"width": 100, "heads": 8}}}, "multiple of text.heads"),
        ({"data": {"sources": []}}, "data.sources"),
        ({"model": {"eval_resize": 200}}, "model.eval_resize 200 is less than model.image_size 224"),
        ({"optimizer": {"name": "lamb"}}, "optimizer.name"),
        ({"backend": "fsdp"}, "'auto', 'ddp', 'fsdp2', 'zero1', 'zero2' or 'zero3'"),
        ({"evaluate": {"every": 1, "shards": "a", "weights": "ema"}}, "no average is kept: set ema: {}"),
        ({"optimizer": {"nesterov": True, "momentum": 0}}, "optimizer.nesterov needs"),
    ],
)
def test_wrong_recipes_are_refused_with_what_would_work(changes, told):
    assert told in refused(**changes)


def test_overrides_reach_into_sections_and_lists(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(dump_recipe(parse_recipe(MINIMAL, "t")))
    recipe = load_recipe(file, ["optimizer.lr=1e-3", "data.sources.0.shards=b", "objectives.clip=0.5"])
    assert (recipe.optimizer.lr, recipe.data.sources[0].shards, recipe.objectives["clip"]) == (1e-3, "b", 0.5)
    file.write_text(file.read_text().replace("- shards: a\n    weight: null", "- a"))
    assert load_recipe(file).data.sources[0].shards == "a"
    assert load_recipe(file, ["data.sources.0.shards=b"]).data.sources[0].shards == "b"
    with pytest.raises(UserError, match="not key=value"):
        load_recipe(file, ["optimizer.lr"])
    with pytest.raises(UserError, match="no position"):
        load_recipe(file, ["data.sources.4.shards=b"])


def test_a_resolved_recipe_reads_back_equal(tmp_path):
    recipe = parse_recipe(MINIMAL | {"epochs": 1.5, "steps": None}, "t")
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "r.yaml") == recipe
    assert recipe.total_steps(100) == 19  # ceil(1.5 * 100 / 8)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean demo\?"):
        load_recipe("dmeo")


def test_objective_options_are_checked_by_the_objective():
    for wanted, told in [
        ({"clop": 1.0}, "did you mean clip?"),
        ({"clip": {"temprature": 1}}, "did you mean temperature?"),
        ({"clip": -1.0}, "objectives.clip.weight"),
        ({"no.such.module": 1.0}, "cannot be loaded"),
    ]:
        with pytest.raises(UserError, match=told.replace("?", r"\?")):
            build(wanted, FACTS)
