"""PyramidCLIP as a run: samples that lack fields, killed and resumed, replayed, beside SwAV; damaged fields."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.errors import UserError
from pretrain.objectives import build
from pretrain.objectives.joint import Joint
from pretrain.recipe import RegionRecipe
from pretrain.replay import replay
from pretrain.telemetry import read_events, read_log
from tests.runs import kill_and_resume, losses, train, train_here, weights
from tests.tiny import FACTS, VIT, WORDS, add, picture, recipe_data, write_recipe, write_shards

MODEL = VIT | {"regions": {"blocks": 1, "most": 4}}
SWAV = {"crops": [[2, 16, [0.3, 1.0]]], "prototypes": 12, "hidden": 16, "dim": 8, "freeze_steps": 0, "weight": 0.5}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """60 samples; two of three have a summary, three of four objects, all but the first shard's stored features."""
    folder = tmp_path_factory.mktemp("pyramid")
    rng = np.random.default_rng(0)
    for shard in range(3):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(20 * shard, 20 * shard + 20):
                key = f"s{i:04d}"
                add(tar, f"{key}.png", picture(i))
                add(tar, f"{key}.txt", f"a {WORDS[i % 8]} thing number {i}\nthing {i}".encode())
                if i % 3:
                    add(tar, f"{key}.summary.txt", f"{WORDS[i % 8]} thing".encode())
                if i % 4:
                    named = {"label": WORDS[i % 5], "attrs": [WORDS[i % 8]], "score": 0.9}
                    corners = rng.uniform(0, 0.5, (i % 3 + 1, 2)).tolist()
                    objects = [named | {"box": [x, y, x + 0.45, y + 0.45]} for x, y in corners]
                    add(tar, f"{key}.json", json.dumps({"objects": objects}).encode())
                if shard:
                    buffer = io.BytesIO()
                    np.save(buffer, rng.normal(size=(i % 4 + 1, 6 + 4)).astype(np.float16))
                    add(tar, f"{key}.roi.npy", buffer.getvalue())
    return folder


def recipe(shards: Path, folder: Path, name: str, **changes) -> Path:
    changes = {"model": MODEL, "objectives": {"pyramid_clip": 1.0}} | changes
    return write_recipe(folder / f"{name}.yaml", recipe_data(shards, folder / name, **changes))


@pytest.mark.parametrize("world", [1, 3])
def test_a_run_resumes_bit_for_bit(tmp_path, shards, world):
    changes = {"world": world, "steps": 10}
    train(str(recipe(shards, tmp_path, "whole", **changes)))
    kill_and_resume(recipe(shards, tmp_path, "cut", **changes), tmp_path / "cut")
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert "model.image.regions.embed.weight" in expected
    assert [n for n in expected if not torch.equal(expected[n], found[n])] == []
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_the_world_and_accumulation_change_nothing(tmp_path, shards):
    """fp32, so to rounding; float64 is in test_objective_steps."""
    for name, changes in {"1": {}, "3": {"world": 3}, "2x2": {"world": 2, "accumulation": 2}}.items():
        train(str(recipe(shards, tmp_path, name, steps=4, **changes)))
    for name in ("3", "2x2"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "1"), rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": VIT | {"regions": {"blocks": 1, "most": 4, "stored_dim": 6}}},
        {"model": VIT, "objectives": {"pyramid_clip": {"regions": False, "tags": False, "softening": 0.0}}},
        {"objectives": {"pyramid_clip": 1.0, "swav": SWAV}},
    ],
    ids=["cut", "stored", "texts alone", "with swav"],
)
def test_replay_gives_the_loss_that_was_logged(tmp_path, shards, changes):
    train(str(recipe(shards, tmp_path, "run", world=2, steps=7, **changes)))
    replayed = replay(tmp_path / "run", 7)
    assert float(replayed.total().mean()) == pytest.approx(losses(tmp_path / "run")[7], rel=1e-4)


def test_shares_of_the_fields_are_logged(tmp_path, shards):
    assert train_here(recipe(shards, tmp_path, "run", steps=5)) == 0
    lines = read_log(tmp_path / "run")  # 5 steps of 12 are one epoch: each sample once
    mean = {f: np.mean([line[f"pyramid_clip/present/{f}"] for line in lines]) for f in ("summary", "tags")}
    assert mean == {"summary": pytest.approx(40 / 60), "tags": pytest.approx(45 / 60)}
    assert 0 < np.mean([line["pyramid_clip/present/regions"] for line in lines]) <= 45 / 60
    for term in ("global-summary", "local-text", "global-tags", "regions-summary", "local-tags", "regions-text"):
        assert lines[0][f"pyramid_clip/{term}"] > 0


def test_plain_captions_train_and_say_what_is_missing(tmp_path):
    plain = write_shards(tmp_path / "plain")
    assert train_here(recipe(plain, tmp_path, "run", steps=3)) == 0
    told = [e["message"] for e in read_events(tmp_path / "run") if e["event"] == "warning"]
    assert [line.partition(" has ")[2].partition(",")[0] for line in told] == ["summary", "tags", "regions"]
    line = read_log(tmp_path / "run")[-1]
    assert line["loss"] == pytest.approx(line["pyramid_clip/local-text"] / 6, rel=1e-5)


def test_a_damaged_field_costs_the_field_alone(tmp_path, shards):
    with tarfile.open(shards / "00000.tar") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    members["s0001.json"] = b"{'objects': }"
    members["s0002.summary.txt"] = b"\xff\xfe"
    folder = tmp_path / "damaged"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in members.items():
            add(tar, name, data)
    assert train_here(recipe(folder, tmp_path, "run", steps=2, global_batch=20, data={"sources": [str(folder)]})) == 0
    noted = [json.loads(line) for line in (tmp_path / "run" / "damaged.jsonl").read_text().splitlines()]
    assert {line["key"] for line in noted} == {"s0001", "s0002"}
    assert len(read_log(tmp_path / "run")) == 2


def test_regions_need_a_tower_that_reads_them(tmp_path, shards, capsys):
    assert train_here(recipe(shards, tmp_path, "run", model=VIT)) == 2
    assert "model.regions: {}" in capsys.readouterr().err


def test_what_is_switched_off_is_not_asked_for():
    def views(**options) -> tuple[int, int, int, int]:
        facts = FACTS.__class__(**{**FACTS.__dict__, "regions": RegionRecipe()})
        joint = Joint(build({"pyramid_clip": options}, facts))
        return len(joint.image_views(16)), len(joint.text_views()), len(joint.region_views()), len(joint.requests())

    assert views() == (2, 3, 1, 6)
    assert views(tags=False) == (2, 2, 1, 5)
    assert views(tags=False, regions=False) == (2, 2, 0, 4)


@pytest.mark.parametrize("weights", [[0, 1, 0], [0, 0, 1]])
def test_options_that_contrast_nothing_are_refused(weights):
    with pytest.raises(UserError, match="nothing else is contrasted"):
        build({"pyramid_clip": {"weights": weights, "tags": False, "regions": False}}, FACTS)
