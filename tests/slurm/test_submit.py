"""A recipe as a job: what sbatch is told, and the same job run here."""

from __future__ import annotations

from pathlib import Path

import pytest
import submitit

from pretrain.telemetry.runlog import read_log
from slurm.__main__ import main
from slurm.submit import TrainJob
from tests.tiny import recipe_data, write_recipe, write_shards


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    shards = write_shards(tmp_path / "shards", samples=24)
    return write_recipe(tmp_path / "r.yaml", recipe_data(shards, tmp_path / "run", steps=2))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that keeps the script it is given and answers as Slurm does."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name in ("sbatch", "srun"):
        (bin_ / name).write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/sent.sh\necho "Submitted batch job 42"\n')
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:/usr/bin:/bin")
    return tmp_path


def submit(*argv: object) -> int:
    return main(["submit", *map(str, argv)])


def test_sbatch_is_told_what_was_asked(recipe: Path, cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--nodes", 2, "--ranks-per-node", 3, "--gpus-per-node", 3, "--cpus-per-rank", 5, "--minutes", 90]
    assert submit(recipe, "steps=7", *asked, "--partition", "long", "--account", "us") == 0
    assert "job 42: tiny on 2 x 3 ranks" in capsys.readouterr().out
    sent = {line.removeprefix("#SBATCH --") for line in (cluster / "sent.sh").read_text().splitlines()}
    assert {"nodes=2", "ntasks-per-node=3", "gpus-per-node=3", "cpus-per-task=5", "time=90", "job-name=tiny"} <= sent
    assert {"partition=long", "account=us"} <= sent
    assert "steps: 7" in next((cluster / "run/slurm").glob("recipe-*.yaml")).read_text()


def test_a_requeued_job_is_the_same_job() -> None:
    job = TrainJob("r.yaml")
    again = job.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function is job


def test_the_same_job_runs_here_on_two_ranks(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(recipe, "--ranks-per-node", 2, "--local", "--wait") == 0
    run = recipe.parent / "run"
    assert [line["step"] for line in read_log(run / "log.jsonl")] == [1, 2]
    assert str(run / "slurm") in capsys.readouterr().out


def test_a_job_that_fails_says_so(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(recipe, "data.sources.0.shards=/nowhere", "--local", "--wait") == 2
    said = Path(capsys.readouterr().err.split("see ")[1].strip())
    (log,) = said.parent.glob(said.name)
    assert "no shard /nowhere" in log.read_text()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["world=3", "--ranks-per-node", "1"], "needs world 3; --nodes x --ranks-per-node is 1"),
        (["--ranks-per-node", "5"], "12"),
        (["--ranks-per-node", "0"], "no rank at all"),
        (["--local", "--nodes", "2"], "--local is this machine alone"),
        ([], "no sbatch on this machine"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_sent(
    recipe: Path, argv: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert submit(recipe, *argv) == 2
    assert says in capsys.readouterr().err
    assert not (recipe.parent / "run").exists()
