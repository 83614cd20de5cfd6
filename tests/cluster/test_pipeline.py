"""Pipelines and sweeps on a real Slurm: killed in two of its stages, one goes on to its end by the same command."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from slurm import records
from slurm.__main__ import main
from tests.cluster.cluster import Cluster
from tests.cluster.pipelines import PARTS, WAIT_S, Pipeline, assert_every_row_once, processes_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def test_killed_in_two_stages_it_goes_on_to_the_report(tmp_path: Path, slurm: Cluster) -> None:
    pipeline = Pipeline(tmp_path, slurm)
    assert pipeline() == 0
    (array,), (evaluation,) = pipeline.jobs("embed"), pipeline.jobs("retrieval")
    slurm.wait_for(lambda: len(pipeline.running(array)) >= 3, WAIT_S, "three embedding jobs that run")
    cancelled, killed, requeued = pipeline.running(array)[:3]
    # USR2: what Slurm sends before the time limit
    for job, number in {requeued: signal.SIGUSR2, killed: signal.SIGKILL}.items():
        for pid in processes_of(job):
            os.kill(pid, number)
    slurm.run("scancel", cancelled, evaluation)
    slurm.wait_for(lambda: not slurm.jobs(), WAIT_S, "the end of all that can still end well")
    restarts = [a.restart for a in records.attempts(pipeline.out / "slurm") if a.job == requeued]
    assert restarts == [0, 1]
    ended = {int(job.split("_")[1]) for job in (cancelled, killed)}
    assert pipeline.marks() == [f"{i:05d}-of-{PARTS:05d}.json" for i in range(PARTS) if i not in ended]
    assert not (pipeline.out / "report.html").exists()

    assert pipeline("--wait") == 0
    assert "<html" in (pipeline.out / "report.html").read_text()
    sent = [line for line in records.submissions(pipeline.out / "slurm") if line["name"] == "embed"]
    assert [line["elements"] for line in sent] == [list(range(PARTS)), sorted(ended)]
    assert len(pipeline.jobs("retrieval")) == 2
    assert len(pipeline.run.starts()) == 1
    assert_every_row_once(pipeline)
    before = len(pipeline.began())
    assert pipeline("--wait") == 0
    assert len(pipeline.began()) == before


@pytest.mark.long
def test_five_of_fifty_are_killed(tmp_path: Path, slurm: Cluster) -> None:
    pipeline = Pipeline(tmp_path, slurm, parts=50)
    assert pipeline() == 0
    (array,) = pipeline.jobs("embed")
    killed: list[str] = []
    while len(killed) < 5:
        slurm.wait_for(lambda: set(pipeline.running(array)) - set(killed), WAIT_S, "an element that runs")
        job = next(job for job in pipeline.running(array) if job not in killed)
        for pid in processes_of(job):
            os.kill(pid, signal.SIGKILL)
        killed.append(job)
    slurm.wait_for(lambda: not slurm.jobs(), 2 * WAIT_S, "the end of all that can still end well")
    lost = sorted(int(job.split("_")[1]) for job in killed)
    assert len(pipeline.marks()) == 50 - len(lost)
    assert pipeline("--wait") == 0
    sent = [line for line in records.submissions(pipeline.out / "slurm") if line["name"] == "embed"]
    assert [line["elements"] for line in sent] == [list(range(50)), lost]
    assert_every_row_once(pipeline)


@pytest.mark.long
def test_killed_in_every_stage_it_goes_on(tmp_path: Path, slurm: Cluster) -> None:
    pipeline = Pipeline(tmp_path, slurm)
    for stage in ("train", "embed", "build", "publish", "retrieval", "report"):
        assert pipeline() == 0
        slurm.wait_for(lambda: pipeline.runs(stage), WAIT_S, f"stage {stage} to run")  # noqa: B023
        slurm.run("scancel", *{job.partition("_")[0] for job in pipeline.runs(stage)})
        slurm.wait_for(lambda: not slurm.jobs(), WAIT_S, "the end of all that can still end well")
    assert pipeline("--wait") == 0
    assert "<html" in (pipeline.out / "report.html").read_text()
    assert_every_row_once(pipeline)


@pytest.mark.long
def test_a_sweep_is_one_array(tmp_path: Path, slurm: Cluster) -> None:
    pipeline, out = Pipeline(tmp_path, slurm), tmp_path / "sweep"
    grid = ("--grid", "optimizer.lr=1e-3,3e-4", "--out", str(out), "--profile", str(pipeline.profile))
    assert main(["sweep", str(pipeline.recipe), *grid]) == 0
    slurm.wait_for(lambda: not slurm.jobs(), WAIT_S, "the end of both runs")
    assert main(["sweep", str(pipeline.recipe), *grid]) == 0
    rows = json.loads((out / "table.json").read_text())
    assert [(row["optimizer.lr"], row["state"], row["step"]) for row in rows] == [(1e-3, "done", 2), (3e-4, "done", 2)]
    assert len(records.submissions(out / "slurm")) == 1
