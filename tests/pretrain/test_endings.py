"""How a start ended decides what the next one does: crashes are counted, refusals are not, what is missing is done."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from downstream.live import Live
from pretrain import setup
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.exit_codes import CRASH_LOOP, CRASHED, DONE, NOT_FINITE, REFUSED
from pretrain.recipe import parse_recipe
from pretrain.step import Step
from pretrain.telemetry import read_events, read_log
from pretrain.telemetry.alive import heartbeats
from pretrain.train import train
from pretrain.trainer import Trainer
from tests.pretrain.test_not_finite import sample_of
from tests.ranks import run_ranks
from tests.runs import start, train_here
from tests.tiny import recipe_data, write_recipe, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def starts(run: Path) -> list[str | None]:
    return [start.get("ended") for start in json.loads((run / "run.json").read_text())]


def broken(*_: Any, **__: Any) -> Any:
    raise ValueError("no such thing")


def test_only_crashes_are_counted_as_crashes(tmp_path, shards, monkeypatch, capsys):
    run, objectives = tmp_path / "run", {"tests.poison": {"sample": sample_of(shards, 0)}}
    data = recipe_data(shards, run, objectives=objectives, faults={"max_crashes": 2})
    recipe = write_recipe(tmp_path / "r.yaml", data)
    (tmp_path / "file").write_text("")
    for _ in range(3):
        assert train_here(recipe, f"checkpoint.to={tmp_path}/file/x") == REFUSED  # the writer cannot write
        assert train_here(recipe) == NOT_FINITE
    assert starts(run) == ["refused"] * 3
    with monkeypatch.context() as patched:
        patched.setattr(Step, "__call__", broken)
        assert train_here(recipe) == CRASHED
        told = capsys.readouterr().err
        assert "rank 0 on " in told
        assert f": ValueError: no such thing, {__file__}:{broken.__code__.co_firstlineno + 1} in broken\n" in told
        assert told.count("Traceback") == 1
        assert train_here(recipe, "model.lock.image=nonsense") == REFUSED
        patched.setattr(Step, "__call__", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train_here(recipe) == 130
        patched.setattr(Step, "__call__", broken)
        assert train_here(recipe) == CRASHED
    assert starts(run) == ["refused"] * 3 + [None, "refused", None]
    assert train_here(recipe) == CRASH_LOOP
    assert train_here(recipe, "faults.max_crashes=3", "faults.nan=skip") == DONE


def test_a_crash_before_the_first_step_counts_too(tmp_path, shards, monkeypatch):
    data = recipe_data(shards, tmp_path / "run", faults={"max_crashes": 1})
    recipe = write_recipe(tmp_path / "r.yaml", data)
    with monkeypatch.context() as patched:
        patched.setattr(setup, "assemble", broken)
        assert train_here(recipe) == CRASHED
    assert train_here(recipe) == CRASH_LOOP


def test_a_last_evaluation_that_could_not_be_read_is_done_by_the_next_start(tmp_path, shards, monkeypatch):
    def away(_: Live) -> Any:
        raise UserError("the disk is away")

    evaluate = {"every": 8, "shards": str(shards), "train": str(shards), "tasks": ["knn"]}
    recipe = write_recipe(tmp_path / "r.yaml", recipe_data(shards, tmp_path / "run", evaluate=evaluate))
    with monkeypatch.context() as patched:
        patched.setattr(Live, "_figures", away)
        assert train_here(recipe) == DONE
    assert starts(tmp_path / "run") == ["unevaluated"]
    assert train_here(recipe) == train_here(recipe) == DONE
    assert starts(tmp_path / "run") == ["unevaluated", "done"]
    assert "eval/knn_top1" in read_log(tmp_path / "run")[-1]


def test_steps_left_out_are_counted_over_the_starts_of_a_run(tmp_path, shards, capsys):
    """The sample comes in each of two epochs; the run is taken up between them, and from the step before the first."""
    objectives = {"tests.poison": {"sample": sample_of(shards, 3), "epoch": None}}
    data = recipe_data(shards, tmp_path / "run", objectives=objectives, faults={"nan": "skip", "max_nan": 1}, steps=5)
    recipe = write_recipe(tmp_path / "r.yaml", data)
    assert train_here(recipe) == DONE
    assert train_here(recipe, "steps=10") == NOT_FINITE
    assert "faults.max_nan=1 steps of this run were left out already" in capsys.readouterr().err
    assert train_here(recipe, "steps=10", "faults.max_nan=2") == DONE
    assert len({e["step"] for e in read_events(tmp_path / "run") if e["event"] == "left-out"}) == 2


def cut_short(rank: int, world: int, shards: str, folder: str) -> list[bool]:
    """One run as it should be; one that crashes in its last evaluation, one that is stopped there, one that crashes
    behind it: each is taken up to its end."""
    process, ended = Process(rank, world, rank, torch.device("cpu")), []
    evaluate = {"every": 2, "shards": shards, "train": shards, "tasks": ["knn"]}
    finish, evaluated = Trainer.finish, Live.run

    def breaks(self: Live, step: int, *more: Any) -> Any:
        return broken() if step == 4 else evaluated(self, step, *more)

    def stops(self: Live, step: int, beat: Any, stop: Any) -> Any:
        return evaluated(self, step, beat, lambda: step == 4)

    def stopping(self: Trainer) -> set[str]:
        return {"stop"} if self._step == 3 else set()

    for name, of, method, instead in (
        ("whole", Live, "run", evaluated),
        ("evaluation", Live, "run", breaks),
        ("stopped", Live, "run", stops),
        ("end", Trainer, "finish", broken),
    ):
        recipe = parse_recipe(recipe_data(Path(shards), Path(folder) / name, steps=4, evaluate=evaluate), "test")
        before, agreed = getattr(of, method), Trainer.agreed
        setattr(of, method, instead)
        Trainer.agreed = stopping if name == "stopped" else agreed  # type: ignore[method-assign]
        try:
            ended.append(train(recipe, process))
        except ValueError:
            ended.append(False)
        finally:
            setattr(of, method, before)
            Trainer.agreed = agreed  # type: ignore[method-assign]
        ended += [train(recipe, process), train(recipe, process)]
    assert (Trainer.finish, Live.run) == (finish, evaluated)
    return ended


@pytest.mark.parametrize("world", [1, 2])
def test_what_an_end_left_undone_is_done_by_the_next_start(tmp_path, shards, world):
    ranks = run_ranks(cut_short, world, str(shards), str(tmp_path))
    assert ranks == [[True] * 3 + [False, True, True] * 3] * world
    expected = read_log(tmp_path / "whole")[-1]
    for name, how in (("whole", []), ("evaluation", [None]), ("stopped", ["stopped"]), ("end", [None])):
        assert starts(tmp_path / name) == [*how, "done"]
        line = read_log(tmp_path / name)[-1]
        assert (line["step"], line["eval/knn_top1"]) == (4, expected["eval/knn_top1"])
        assert ("loss" in line) == (name != "evaluation")
        kinds = [e["event"] for e in read_events(tmp_path / name)]
        assert (kinds[-1], kinds.count("end")) == ("end", 1)
        assert {sign["phase"] for sign in heartbeats(tmp_path / name)} == {"end"}


def test_a_crash_of_all_ranks_is_told_once_and_each_names_its_place(tmp_path, shards):
    data = recipe_data(shards, tmp_path / "run", world=2, objectives={"tests.raises": {}}, steps=2)
    process = start(str(write_recipe(tmp_path / "r.yaml", data)))
    _, told = process.communicate(timeout=100)
    assert process.returncode == CRASHED, told
    assert told.count("Traceback (most recent call last)") == 1
    for rank in range(2):
        said = re.findall(rf"error: rank {rank} on \S+: RuntimeError: no loss today, \S+/raises.py:\d+ in loss", told)
        assert len(said) == 1
