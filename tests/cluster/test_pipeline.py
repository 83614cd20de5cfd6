"""Pipelines and sweeps on a real Slurm: killed in two of its stages, one goes on to its end by the same command."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from index.store.collection import Collection
from index.store.unit import finished_units
from pretrain.run import RunFolder
from slurm import records
from slurm.__main__ import main
from tests.cluster.cluster import Cluster
from tests.tiny import recipe_data, write_recipe, write_shards

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

PARTS, SAMPLES = 12, 60
WAIT_S = 300.0


class Pipeline:
    def __init__(self, place: Path, cluster: Cluster) -> None:
        self.out, self.cluster = place / "pipe", cluster
        self.shards = write_shards(place / "shards", samples=SAMPLES, shards=PARTS)
        self.run = RunFolder(place / "run")
        self.recipe = write_recipe(place / "r.yaml", recipe_data(self.shards, self.run.path, steps=2))
        self.profile = place / "site.yaml"
        self.profile.write_text("cpus_per_rank: 1\nminutes: 30\nenv: {OMP_NUM_THREADS: '1'}\n")

    def __call__(self, *flags: str) -> int:
        given = ("--shards", self.shards, "--out", self.out, "--profile", self.profile, "--tasks", "retrieval", *flags)
        return main(["pipeline", str(self.recipe), "--parallel", "4", *map(str, given)])

    def jobs(self, stage: str) -> list[str]:
        """Of every time that it was sent."""
        return [line["job"] for line in records.submissions(self.out / "slurm") if line["name"] == stage]

    def began(self) -> list[str]:
        return [attempt.job for attempt in records.attempts(self.out / "slurm")]

    def marks(self) -> list[str]:
        return sorted(file.name for file in (self.out / "stages/embed").glob("*.json"))


def processes_of(element: str) -> list[int]:
    """The Python of an array's element, on whichever node."""
    array, task = element.split("_")
    wanted = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={task}".encode()}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            variables = set((process / "environ").read_bytes().split(b"\0"))
        except OSError:
            continue
        if wanted <= variables and b"submitit.core._submit" in words and b"python" in words[0]:
            found.append(int(process.name))
    return found


def test_killed_in_two_stages_it_goes_on_to_the_report(tmp_path: Path, slurm: Cluster) -> None:
    pipeline = Pipeline(tmp_path, slurm)
    assert pipeline() == 0
    (array,), (evaluation,) = pipeline.jobs("embed"), pipeline.jobs("retrieval")

    def running() -> list[str]:
        return [job for job in pipeline.began() if job.startswith(f"{array}_")]

    slurm.wait_for(lambda: len(running()) >= 3, WAIT_S, "three embedding jobs that run")
    cancelled, killed, requeued = running()[:3]
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


def assert_every_row_once(pipeline: Pipeline) -> None:
    (embeddings,) = (pipeline.out / "embeddings").iterdir()
    units = finished_units(embeddings).values()
    assert len({unit.source for unit in units}) == len(units) == PARTS
    manifest, segments = Collection(pipeline.out / "collection").open()
    keys = [str(key) for segment in segments for key in segment.meta["key"].to_pylist()]
    assert sorted(keys) == [f"s{i:04d}" for i in range(SAMPLES)]
    assert manifest.rows == manifest.members == SAMPLES


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
