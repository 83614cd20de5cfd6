"""A run without captions whose momentum teacher is the encoder: trained, embedded, searched by image."""

from __future__ import annotations

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


def test_a_teachers_vectors_are_searched_with_the_teacher(tmp_path, capsys):
    shards, run, c = write_shards(tmp_path / "shards"), tmp_path / "run", tmp_path / "c"
    data = recipe_data(shards, run, model=MODEL, objectives={"moco": MOCO}, steps=3)
    assert train_here(write_recipe(tmp_path / "r.yaml", data)) == 0
    student, teacher = polyview.load(run), polyview.load(run, teacher=True)
    assert student.fingerprint != teacher.fingerprint
    assert index("embed", run, shards, "--images", "--teacher", "--out", tmp_path / "e") == 0
    assert index("build", c, "--from", tmp_path / "e") == 0
    assert index("publish", c) == 0
    (tmp_path / "a.png").write_bytes(picture(3))
    capsys.readouterr()
    assert index("search", c, "--image", tmp_path / "a.png", "-k", 1) == 0
    assert " s0003 " in capsys.readouterr().out
    assert polyview.open_index(c).manifest.fingerprint == teacher.fingerprint


def test_a_run_without_a_teacher_says_so(run):
    with pytest.raises(UserError, match="holds no teacher"):
        polyview.load(run, teacher=True)
