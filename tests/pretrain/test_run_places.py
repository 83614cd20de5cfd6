"""Where a run's checkpoints are: none is forgotten when the place changes, and no place is shared with another run."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import commit, find_checkpoint
from pretrain.checkpoint.layout import step_dirs
from pretrain.distributed.process import Process
from pretrain.recipe import parse_recipe
from pretrain.telemetry import read_events
from pretrain.train import train as train_loop
from tests.ranks import run_ranks
from tests.runs import train_here
from tests.tiny import recipe_data, write_recipe, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


def resumed(run: Path) -> list[int]:
    return [event["step"] for event in read_events(run) if event["event"] == "resume"]


def test_a_run_goes_on_wherever_it_has_saved(tmp_path, shards, capsys, monkeypatch):
    run, to = tmp_path / "run", "checkpoint.to="
    recipe = write_recipe(tmp_path / "r.yaml", recipe_data(shards, run, checkpoint={"every": 2}))
    monkeypatch.chdir(tmp_path)
    assert train_here(recipe, "steps=2", f"{to}first") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train_here(recipe, "steps=4", f"{to}{tmp_path / 'second'}") == 0
    assert train_here(recipe, "steps=6") == 0
    assert resumed(run) == [2, 4]
    assert find_checkpoint(run).step == 6
    shutil.rmtree(run / "checkpoints")
    third = f"{to}{tmp_path / 'third'}"
    assert train_here(recipe, "steps=6", third) == 2
    assert "to go on from step 4: checkpoint.lost=6" in capsys.readouterr().err
    assert find_checkpoint(run).step == 4  # relative to where its start was, wherever we are
    assert train_here(recipe, "steps=6", third, "checkpoint.lost=6") == 0
    assert resumed(run) == [2, 4, 4]

    for place in ("first", "second", "third"):
        shutil.rmtree(tmp_path / place)
    before = (run / "run.json").read_text()
    assert train_here(recipe, "steps=8") == 2
    told = capsys.readouterr().err
    assert "its log tells of a checkpoint of step 6, and there is none in" in told
    assert all(str(tmp_path / place) in told for place in ("run/checkpoints", "first", "second", "third"))
    assert "another output" in told
    assert (run / "run.json").read_text() == before


def test_a_copied_run_takes_nothing_from_the_first(tmp_path, shards, capsys):
    changes = {"checkpoint": {"to": str(tmp_path / "to"), "keep_last": 1}}
    one, two = (
        str(write_recipe(tmp_path / f"{name}.yaml", recipe_data(shards, tmp_path / name, **changes)))
        for name in ("one", "two")
    )
    assert train_here(one, "steps=2") == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert train_here(two, "steps=4") == 2
    assert f"{tmp_path / 'two'} is a copy of that run" in capsys.readouterr().err
    assert list(step_dirs(tmp_path / "to")) == [2]
    shutil.rmtree(tmp_path / "one")  # it was moved, not copied
    assert train_here(two, "steps=4") == 0
    assert resumed(tmp_path / "two") == [2]


def test_two_runs_do_not_share_a_place(tmp_path, shards, capsys):
    to = tmp_path / "to"
    one, two = (
        write_recipe(tmp_path / f"{name}.yaml", recipe_data(shards, tmp_path / name, checkpoint={"to": str(to)}))
        for name in ("one", "two")
    )
    assert train_here(one, "steps=2") == 0
    saved = {path: path.read_bytes() for path in to.rglob("*") if path.is_file()}
    assert train_here(two, "steps=4") == 2
    told = capsys.readouterr().err
    assert f"another run keeps its checkpoints (id {(tmp_path / 'one/run_id').read_text().strip()}" in told
    assert f"output {tmp_path / 'one'}" in told
    assert {path: path.read_bytes() for path in to.rglob("*") if path.is_file()} == saved
    assert train_here(two, "steps=4", f"checkpoint.to={to / 'two'}") == 0
    assert list(step_dirs(to)) == [2]

    shutil.rmtree(tmp_path / "one")  # a lost disk: the same command goes on once it is said who it is
    assert train_here(one, "steps=3") == 2
    (id_,) = [path.stem.removeprefix("run-") for path in to.glob("run-*.json")]
    (tmp_path / "one/run_id").write_text(id_)
    assert train_here(one, "steps=3") == 0
    assert resumed(tmp_path / "one") == [2]


def test_a_place_given_to_another_run_is_looked_at_no_more(tmp_path, shards):
    one = write_recipe(tmp_path / "one.yaml", recipe_data(shards, tmp_path / "one"))
    two = write_recipe(tmp_path / "two.yaml", recipe_data(shards, tmp_path / "two", seed=1))
    to = f"checkpoint.to={tmp_path / 'to'}"
    assert train_here(one, "steps=1", to) == 0
    assert train_here(one, "steps=2") == 0
    shutil.rmtree(tmp_path / "to")
    assert train_here(two, "steps=4", to) == 0
    assert train_here(one, "steps=3") == 0
    assert resumed(tmp_path / "one") == [1, 2]


def _commit_slowly(rank: int, world: int, shards: str, folder: str) -> bool:
    """The watchdog would end a rank after two seconds without a sign of life."""
    real = commit._put

    def slow(*manifest) -> None:
        time.sleep(5)
        real(*manifest)

    commit._put = slow
    changes = {"steps": 4, "checkpoint": {"every": 2}, "faults": {"hang_s": 2}, "evaluate": None}
    recipe = parse_recipe(recipe_data(Path(shards), Path(folder) / "run", **changes), "test")
    return train_loop(recipe, Process(rank, world, rank, torch.device("cpu")))


def test_a_slow_commit_is_no_hang_on_any_rank(tmp_path, shards):
    assert run_ranks(_commit_slowly, 3, str(shards), str(tmp_path)) == [True] * 3
    assert list(step_dirs(tmp_path / "run/checkpoints")) == [4, 2]
