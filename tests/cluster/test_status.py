"""A run on a real Slurm is watched, saved, ended and submitted again by the commands for it; the site is examined."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.telemetry import read_events
from slurm import records
from slurm.__main__ import main
from tests.cluster.cluster import Cluster
from tests.tiny import recipe_data, write_recipe, write_shards

pytestmark = pytest.mark.cluster

START_S = 120.0


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """It trains until it is ended."""
    shards = write_shards(tmp_path / "shards")
    data = recipe_data(shards, tmp_path / "run", steps=100_000, checkpoint={"every": 5000}, faults={"heartbeat_s": 0.5})
    return write_recipe(tmp_path / "r.yaml", data)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    file = tmp_path / "site.yaml"
    file.write_text("cpus_per_rank: 1\nminutes: 30\noffline: true\nenv: {OMP_NUM_THREADS: '1'}\n")
    return file


@pytest.fixture
def ask(slurm: Cluster, capsys: pytest.CaptureFixture[str]) -> Any:
    """What a command answers with --json."""

    def answer(*argv: object) -> Any:
        capsys.readouterr()
        assert main([*map(str, argv), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return answer


def trains(run: Path, starts: int, slurm: Cluster) -> None:
    """Wait until start number `starts` of the run has logged a step."""

    def logged() -> bool:
        if not (run / "log.jsonl").is_file():
            return False
        begun = [event for event in read_events(run) if event["event"] in ("start", "resume")]
        newest = (run / "log.jsonl").read_text().rpartition('"resume"' if starts > 1 else '"start"')[2]
        return len(begun) >= starts and '"loss"' in newest

    slurm.wait_for(logged, START_S, f"a step of start {starts}: {told(run)}")


def told(run: Path) -> str:
    return "\n".join(log.read_text()[-1500:] for log in sorted((run / "slurm").glob("*_log.err")))


def test_a_run_from_its_start_to_other_nodes(
    recipe: Path, profile: Path, slurm: Cluster, ask: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recipe.parent / "run"
    assert main(["submit", str(recipe), "--nodes", "2", "--profile", str(profile)]) == 0
    job = records.submissions(run / "slurm")[0]["job"]
    trains(run, 1, slurm)
    found = ask("status", run)
    (status,), details = found["runs"], found["details"]
    assert (status["state"], status["jobs"], status["nodes"]) == ("RUNNING", [job], ["n1", "n2"])
    assert f"job {job} on n[1-2]" in status["detail"]
    assert status["eta_s"] > 0
    assert details["ranks"] == []
    assert [attempt["how"] for attempt in details["attempts"]] == ["runs"]

    assert ask("requeue", run)["how"] == "saves and requeues"
    trains(run, 2, slurm)
    (status,) = ask("status", run)["runs"]
    assert (status["restarts"], status["last_end"]) == (1, "requeued")
    assert slurm.restarts(job) == 1
    assert any("resuming at step" in line for line in ask("logs", run, "--lines", 1000)["lines"])

    (ended,) = ask("cancel", run, "--save-first")
    assert ended["saved"] == ended["step"] == read_events(run)[-1].get("step", ended["step"])
    assert (run / f"checkpoints/step_{ended['saved']:08d}/manifest.json").is_file()
    slurm.wait_for(lambda: job not in slurm.jobs(), 60, "the job to leave the queue")
    (status,) = ask("status", run)["runs"]
    assert (status["state"], status["saved"]) == ("stopped", ended["saved"])

    again = ask("requeue", run, "--nodes", 3, "--profile", profile)
    assert (again["how"], again["nodes"]) == ("submitted", "3")
    assert slurm.job(again["job"])["NumNodes"] in ("3", "3-3")  # as it waits
    assert main(["cancel", str(run)]) == 0
    assert again["job"] in capsys.readouterr().out


def test_a_job_that_is_held(recipe: Path, profile: Path, slurm: Cluster, ask: Any) -> None:
    run = recipe.parent / "run"
    profile.write_text("cpus_per_rank: 1\nsbatch: {hold: true}\n")
    assert main(["submit", str(recipe), "--profile", str(profile)]) == 0
    job = records.submissions(run / "slurm")[0]["job"]
    (status,) = ask("status", run)["runs"]
    assert (status["state"], status["step"]) == ("PENDING", None)
    assert status["detail"] == f"job {job}: held by its user: `scontrol release {job}`"
    assert main(["logs", str(run)]) == 2
    (ended,) = ask("cancel", job)
    assert (ended["job"], ended["step"]) == (job, None)
    slurm.wait_for(lambda: slurm.state(job) == "CANCELLED", 30, "the job's end")
    patience = time.monotonic() + 30
    while (status := ask("status", run)["runs"][0])["detail"] != f"job {job}: CANCELLED by the accounting":
        assert time.monotonic() < patience, status  # the accounting lags
        time.sleep(0.5)
    assert status["state"] == "never began"


def test_the_site_and_its_nodes(
    profile: Path, slurm: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(profile.parent)
    asked = ["--nodes", "3", "--gpus-per-node", "2", "--ranks-per-node", "1"]
    assert main(["doctor", "--profile", str(profile), *asked, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["facts"]["nodes"] == "n1, n2, n3"
    problems = [problem["what"] for problem in found["problems"]]
    assert problems == ["2 GPUs a node are asked for, torch sees 0 on n1, n2, n3"]  # they have only the name
    assert list(profile.parent.glob(".doctor-*")) == []
