"""A sweep: which runs a grid makes, what Slurm is told of them, what is run again, and the table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from pretrain.errors import UserError
from pretrain.run import RunFolder
from slurm import ledger
from slurm.__main__ import main
from slurm.sweep import grid, trials
from tests.slurm.queues import FakeSlurm
from tests.tiny import recipe_data, write_recipe, write_shards

GRID = ("optimizer.lr=1e-3,3e-4", "objectives.clip=1.0")
NAMES = ["objectives.clip=1.0_optimizer.lr=0.001", "objectives.clip=1.0_optimizer.lr=0.0003"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    shards = write_shards(tmp_path / "shards", samples=24)
    knn = {"tasks": ["knn"], "shards": str(shards), "train": str(shards), "every": 2}
    return write_recipe(tmp_path / "r.yaml", recipe_data(shards, tmp_path / "run", steps=2, evaluate=knn))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("PATH", fake.path)
    return fake


def sweep(recipe: Path, *argv: object) -> int:
    return main(["sweep", str(recipe), "--grid", *GRID, "--out", str(recipe.parent / "sweep"), *map(str, argv)])


def rows(recipe: Path) -> list[dict]:
    return json.loads((recipe.parent / "sweep/table.json").read_text())


def test_a_run_is_named_by_its_values_in_whatever_order_and_form_they_come(recipe: Path) -> None:
    found = trials(str(recipe), [], grid(GRID), Path("/sweep"))
    assert [trial.name for trial in found] == NAMES
    assert [trial.recipe.optimizer.lr for trial in found] == [1e-3, 3e-4]
    assert [trial.run for trial in found] == [Path("/sweep", name) for name in NAMES]
    again = trials(str(recipe), [], grid(["objectives.clip=1.0", "optimizer.lr=0.0003"]), Path("/sweep"))
    assert [trial.name for trial in again] == NAMES[1:]


def test_every_combination_is_a_run(recipe: Path) -> None:
    found = trials(str(recipe), [], grid(["seed=0,1,2", "optimizer.lr=1e-3,1e-4"]), Path("/sweep"))
    assert {(t.recipe.seed, t.recipe.optimizer.lr) for t in found} == {(s, x) for s in range(3) for x in (1e-3, 1e-4)}
    assert len({trial.run for trial in found}) == 6


def test_values_that_cannot_stand_in_a_name_stay_apart(recipe: Path) -> None:
    shards = [write_shards(recipe.parent / name, samples=6) for name in ("a/b", "a-b")]
    word = "data.sources.0.shards=" + ",".join(map(str, shards))
    names = [trial.name for trial in trials(str(recipe), [], grid([word]), Path("/sweep"))]
    assert len(set(names)) == 2
    assert not any("/" in name for name in names)


def test_a_comma_within_brackets_is_part_of_a_value() -> None:
    assert grid(["optimizer.betas=[0.9,0.98],[0.9,0.999]"]) == {"optimizer.betas": ["[0.9,0.98]", "[0.9,0.999]"]}


@pytest.mark.parametrize("word", ["optimizer.lr", "=1,2", "optimizer.lr=1,,2", "optimizer.lr="])
def test_what_is_no_grid_is_refused(word: str) -> None:
    with pytest.raises(UserError, match="give key=value,value"):
        grid([word])


def test_one_value_written_in_two_ways_is_refused(recipe: Path) -> None:
    with pytest.raises(UserError, match="written in two ways"):
        trials(str(recipe), [], grid(["optimizer.lr=1e-3,0.001"]), Path("/sweep"))


def test_the_script_is_one_throttled_array(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(recipe, "--parallel", 1, "--minutes", 7, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "#SBATCH --array=0-1%1\n" in told
    assert "#SBATCH --time=7\n" in told
    assert not (recipe.parent / "sweep").exists()


def test_only_what_is_neither_done_nor_under_way_is_sent(recipe: Path, slurm: FakeSlurm) -> None:
    assert sweep(recipe, "--parallel", 1) == 0
    (script,) = slurm.sent()
    assert "--array=0-1%1" in script
    assert [row["state"] for row in rows(recipe)] == ["pending (1_0)", "pending (1_1)"]
    slurm.drop("1_1")  # failed
    assert sweep(recipe) == 0
    assert len(slurm.sent()) == 2
    assert "--array" not in slurm.sent()[1]
    assert [row["state"] for row in rows(recipe)] == ["pending (1_0)", "pending (2)"]
    assert sweep(recipe) == 0
    assert len(slurm.sent()) == 2


def test_elements_that_are_about_to_come_back_are_not_sent_again(
    recipe: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sweep(recipe) == 0
    monkeypatch.setattr(ledger, "ENDING_S", 0)
    queue = recipe.parent / "fake/queue"
    queue.write_text(queue.read_text().replace("1_0|PENDING", "1_0|COMPLETING"))  # their node is lost
    assert sweep(recipe) == 0
    assert len(slurm.sent()) == 1
    assert [row["state"] for row in rows(recipe)] == ["completing (1_0)", "pending (1_1)"]


# ---------------------------------------------------------------- a trial alone


def test_a_trial_waits_and_runs_as_the_element_of_its_array(
    recipe: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sweep(recipe) == 0
    trial = recipe.parent / "sweep" / NAMES[1]
    (recipe.parent / "alias").symlink_to("sweep")
    assert main(["requeue", str(recipe.parent / "alias" / NAMES[1])]) == 2
    assert f"job 1_1 of {recipe.parent / 'alias' / NAMES[1]} waits for its turn already" in capsys.readouterr().err
    slurm.run("1_1")
    monkeypatch.chdir(recipe.parent)
    assert main(["status", str(trial), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    assert (told["run"], told["state"], told["jobs"]) == (f"sweep/{NAMES[1]}", "RUNNING", ["1_1"])
    assert main(["requeue", str(trial)]) == 0
    assert "job 1_1 saves and goes back into the queue" in capsys.readouterr().out
    assert slurm.cancelled() == ["--signal=USR2", "1_1"]
    assert len(slurm.sent()) == 1


def test_a_trial_is_cancelled_alone(recipe: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(recipe) == 0
    trial = recipe.parent / "sweep" / NAMES[0]
    capsys.readouterr()
    assert main(["cancel", str(trial)]) == 0
    assert capsys.readouterr().out == f"job 1_0 of {trial}: cancelled before it began\n"
    assert slurm.cancelled() == ["1_0"]


def test_a_trial_that_ended_goes_on_alone_as_before(
    recipe: Path, slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site.yaml").write_text("partition: long\nenv: {MINE: '1'}\nsetup: [module load cuda]\n")
    monkeypatch.chdir(tmp_path)
    assert sweep(recipe, "--profile", "site.yaml", "--gpus-per-node", 2, "--minutes", 90) == 0
    slurm.drop("1_0", "1_1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    asked = tmp_path / "fake/from"
    sbatch = tmp_path / "fake/bin/sbatch"
    sbatch.write_text(sbatch.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\npwd > {asked}\n"))
    trial = tmp_path / "sweep" / NAMES[0]
    assert main(["requeue", str(trial)]) == 0
    alone = slurm.sent()[1]
    for flag in ("--partition=long", "--gpus-per-node=2", "--ntasks-per-node=2", "--time=90", f"polyview:{trial}"):
        assert flag in alone
    assert "module load cuda" in alone
    assert "export MINE=1" in alone
    assert asked.read_text().strip() == str(tmp_path)
    monkeypatch.chdir(tmp_path)
    slurm.run("2")
    assert sweep(recipe) == 0  # it runs: only the other one is sent
    assert len(slurm.sent()) == 3
    assert "--array" not in slurm.sent()[2]
    assert [row["state"] for row in rows(recipe)] == ["running (2)", "pending (3)"]


# ---------------------------------------------------------------- on this machine


def test_runs_here_are_tabled_and_not_run_again(recipe: Path) -> None:
    assert sweep(recipe, "--local", "--parallel", 2) == 0
    runs = [RunFolder(recipe.parent / "sweep" / name) for name in NAMES]
    found = rows(recipe)
    assert [(row["run"], row["optimizer.lr"], row["state"], row["step"]) for row in found] == [
        (NAMES[0], 1e-3, "done", 2), (NAMES[1], 3e-4, "done", 2)
    ]  # fmt: skip
    assert found[0]["loss"] != found[1]["loss"]  # of the second step, after one update
    assert all(0 <= row["eval/knn_top1"] <= 1 for row in found)
    table = list(csv.DictReader((recipe.parent / "sweep/table.csv").open()))
    assert [float(row["loss"]) for row in table] == [row["loss"] for row in found]
    assert sweep(recipe, "--local") == 0
    assert [len(run.starts()) for run in runs] == [1, 1]
    assert sweep(recipe, "steps=3", "--table") == 0
    assert [row["state"] for row in rows(recipe)] == ["fewer steps than asked"] * 2
