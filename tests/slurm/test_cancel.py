"""Jobs are ended, saved before where that is asked, and submitted again as they were or with other nodes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from slurm import cancel, records
from slurm.__main__ import main
from tests.runs import Start, start, wait_for_a_step
from tests.slurm.queues import FakeSlurm
from tests.tiny import recipe_data, write_recipe, write_shards

SCANCEL = """#!/bin/sh
echo "$@" >> {folder}/cancelled
case "$1" in
  --signal=USR1) kill -USR1 {pid} ;;
  --signal=*) ;;
  *) sed -i "/^$1|/d" {folder}/queue ;;
esac
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    shards = write_shards(tmp_path / "shards", samples=24)
    data = recipe_data(shards, tmp_path / "run", steps=100_000, checkpoint={"every": 1000})
    return write_recipe(tmp_path / "r.yaml", data)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("PATH", fake.path)
    scancel(tmp_path, 0)
    return fake


def scancel(folder: Path, pid: int) -> None:
    """Slurm's signal reaches process `pid`."""
    (folder / "fake/bin/scancel").write_text(SCANCEL.format(folder=folder / "fake", pid=pid))


def running(run: Path, state: str = "RUNNING") -> None:
    """Job 1 trains `run`."""
    records.append(run / "slurm", "began", job="1", restart=0, nodes=["n1"], silent=[])
    line = f"1|{state}|None|1|n1|0:01|1:00:00|N/A|tiny|polyview:{run}\n"
    (run.parent / "fake/queue").write_text(line)


def training(recipe: Path) -> Start:
    """A real run under way, told of as job 1."""
    run = recipe.parent / "run"
    process = start(str(recipe))
    wait_for_a_step(run / "log.jsonl", process)
    running(run)
    scancel(recipe.parent, process.pid)
    return process


# ---------------------------------------------------------------- cancel


def test_saved_first(
    recipe: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancel, "LEAVE_S", 1.0)  # it does not leave this queue by itself
    process = training(recipe)
    run = recipe.parent / "run"
    time.sleep(0.5)
    assert main(["cancel", str(run), "--save-first", "--json", "--limit-s", "60"]) == 0
    (ended,) = json.loads(capsys.readouterr().out)
    assert process.wait(60) == 75
    assert ended["saved"] == ended["step"] > 0
    assert ended["lost"] == 0
    assert (run / f"checkpoints/step_{ended['saved']:08d}/manifest.json").is_file()
    assert slurm.cancelled() == ["--signal=USR1", "1", "1"]


def test_at_once_it_is_told_what_is_lost(recipe: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    process = training(recipe)
    try:
        assert main(["cancel", "1"]) == 0
        said = capsys.readouterr().out
        assert "nothing was saved, at least" in said
        assert "steps are lost" in said
        assert slurm.cancelled() == ["1"]
    finally:
        process.kill()


def test_a_save_that_does_not_come_leaves_the_job(
    recipe: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recipe.parent / "run"
    assert main(["submit", str(recipe)]) == 0
    running(run)
    (recipe.parent / "fake/bin/scancel").write_text(f"#!/bin/sh\necho $@ >> {recipe.parent}/fake/cancelled\n")
    assert main(["cancel", str(run), "--save-first", "--limit-s", "0.1"]) == 2
    assert "has not saved within 0 s" in capsys.readouterr().err
    assert slurm.cancelled() == ["--signal=USR1", "1"]


def test_jobs_that_wait_or_train_nothing_are_simply_ended(
    recipe: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(recipe)]) == 0
    out = recipe.parent / "out"
    with open(recipe.parent / "fake/queue", "a") as queue:
        queue.write(f"7_0|RUNNING|None|1|n1|0:01|1:00:00|N/A|embed|polyview:{out}\n")
        queue.write(f"8|PENDING|Dependency|1||0:00|1:00:00|N/A|build|polyview:{out}\n")
    assert main(["cancel", str(out), "--save-first"]) == 0
    assert "job 7_0: cancelled\njob 8: cancelled\n" in capsys.readouterr().out
    assert main(["cancel", str(recipe.parent / "run"), "--save-first"]) == 0
    assert "cancelled before it began" in capsys.readouterr().out
    assert slurm.cancelled() == ["7_0", "8", "1"]
    assert main(["cancel", "8"]) == 2
    assert "no job of 8 is in the queue" in capsys.readouterr().err


# ---------------------------------------------------------------- requeue


def flags(text: str) -> set[str]:
    return {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}


def trained(text: str) -> str:
    """The recipe that a script's job trains."""
    folder = Path(next(line.split("=", 1)[1] for line in text.splitlines() if "--comment=" in line).split(":")[1])
    line = records.submissions(folder / "slurm")[-1]
    return (folder / "slurm" / line["recipe"]).read_text()


def test_one_that_runs_is_told_to_save_and_come_back(
    recipe: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recipe.parent / "run"
    assert main(["submit", str(recipe)]) == 0
    running(run)
    assert main(["requeue", str(run)]) == 0
    assert "job 1 saves and goes back into the queue" in capsys.readouterr().out
    assert slurm.cancelled() == ["--signal=USR2", "1"]


def test_one_that_waits_for_its_turn_is_left_to_wait(
    recipe: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(recipe)]) == 0
    assert main(["requeue", str(recipe.parent / "run")]) == 2
    assert "waits for its turn already: other jobs come first" in capsys.readouterr().err
    assert slurm.cancelled() == []


def test_one_that_ended_is_submitted_as_before(recipe: Path, slurm: FakeSlurm, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("partition: long\nenv: {MINE: '1'}\n")
    asked = ["--nodes", "2", "--ranks-per-node", "3", "--minutes", "90", "--profile", str(tmp_path / "site.yaml")]
    assert main(["submit", str(recipe), "steps=7", *asked]) == 0
    slurm.drop("1")
    (tmp_path / "site.yaml").unlink()
    assert main(["requeue", str(tmp_path / "run")]) == 0
    first, second = slurm.sent()
    assert flags(second) == flags(first)
    assert "export MINE=1" in second
    assert "steps: 7" in trained(second)


def test_one_that_is_held_is_replaced(recipe: Path, slurm: FakeSlurm) -> None:
    run = recipe.parent / "run"
    assert main(["submit", str(recipe)]) == 0
    line = f"1|PENDING|JobHeldAdmin|1||0:00|1:00:00|N/A|tiny|polyview:{run}\n"
    (run.parent / "fake/queue").write_text(line)
    assert main(["requeue", str(run)]) == 0
    assert slurm.cancelled() == ["1"]
    assert len(slurm.sent()) == 2


def test_with_other_nodes_the_world_is_another(
    recipe: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recipe.parent / "run"
    assert main(["submit", str(recipe), "world=2", "--nodes", "2", "--exclude", "n7"]) == 0
    records.append(run / "slurm", "began", job="1", restart=0, nodes=["n1", "n2"], silent=[])
    records.append(run / "slurm", "began", job="1", restart=1, nodes=["n1", "n3"], silent=["n2", "n1"])
    assert main(["requeue", str(run), "--nodes", "5"]) == 2  # 12 into 5
    assert "world 5" in capsys.readouterr().err
    assert slurm.cancelled() == []
    assert main(["requeue", str(run), "--nodes", "3", "--exclude", "n2"]) == 0
    assert {"nodes=3", "exclude=n7,n2"} <= flags(slurm.sent()[1])
    assert "world: 3" in trained(slurm.sent()[1])
    assert slurm.cancelled() == ["1"]  # it waited with other nodes
    assert f"suspect nodes: n1 fell silent before the others; to leave out: python -m slurm requeue {run}" in (
        capsys.readouterr().out
    )


def test_paths_of_a_recipe_start_where_it_was_submitted(
    recipe: Path, slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "r.yaml", "output=run"]) == 0
    slurm.drop("1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "fake/bin/sbatch").write_text(f"#!/bin/sh\npwd > {tmp_path}/from\necho Submitted batch job 2\n")
    assert main(["requeue", "../run"]) == 0
    assert (tmp_path / "from").read_text().strip() == str(tmp_path)
    assert os.listdir(tmp_path / "elsewhere") == []


def test_what_is_no_run_cannot_go_on(slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["requeue", str(tmp_path / "none")]) == 2
    assert "is not a run" in capsys.readouterr().err
