"""A run without captions whose teacher, or average, is the encoder: trained, embedded, searched by image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import polyview
from index.__main__ import DOC, VERBS
from pretrain import cli
from pretrain.errors import UserError
from tests.runs import train_here
from tests.tiny import picture, recipe_data, write_recipe, write_shards

MOCO = {"queue": 24, "dim": 8, "hidden": 16, "momentum": 0.5}
MODEL = {"image": "test_resnet", "image_size": 32, "embed_dim": None, "text": None}


def index(*argv: object) -> int:
    return cli.main("index", DOC, VERBS, [str(a) for a in argv])


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    data = recipe_data(shards, folder / "run", model=MODEL, objectives={"moco": MOCO}, ema={}, steps=3)
    assert train_here(write_recipe(folder / "r.yaml", data)) == 0
    return folder / "run"


def searched(collection: Path, embeddings: Path) -> str:
    """Fingerprint of the encoder that the collection's own images were found with."""
    assert index("build", collection, "--from", embeddings) == 0
    assert index("publish", collection) == 0
    found = polyview.open_index(collection)
    assert found.items(found.search([picture(3)], k=1).ids[0])[0]["key"] == "s0003"
    return found.encoder.fingerprint


@pytest.mark.parametrize("weights", ["teacher", "ema"])
def test_vectors_are_searched_with_the_weights_that_made_them(tmp_path, shards, trained, weights):
    spaces = {which: polyview.load(trained, weights=which).fingerprint for which in ("model", "teacher", "ema")}
    assert len(set(spaces.values())) == 3
    assert index("embed", trained, shards, "--images", "--weights", weights, "--out", tmp_path / "e") == 0
    assert searched(tmp_path / "c", tmp_path / "e") == spaces[weights]


def test_collections_that_say_teacher_still_open(tmp_path, shards, trained):
    """As they did before the choice had a name."""
    assert index("embed", trained, shards, "--images", "--weights", "teacher", "--out", tmp_path / "e") == 0
    for file in (tmp_path / "e").glob("units/*/DONE.json"):
        done = json.loads(file.read_text())
        assert done["encoder"].pop("weights") == "teacher"
        file.write_text(json.dumps(done | {"encoder": done["encoder"] | {"teacher": True}}))
    assert searched(tmp_path / "c", tmp_path / "e") == polyview.load(trained, weights="teacher").fingerprint


@pytest.mark.parametrize("weights", ["teacher", "ema"])
def test_a_run_without_them_says_so(run, weights):
    with pytest.raises(UserError, match=f"holds no {weights}"):
        polyview.load(run, weights=weights)
