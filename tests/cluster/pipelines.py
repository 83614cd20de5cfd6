"""A pipeline on the cluster, watched from outside."""

from __future__ import annotations

from pathlib import Path

from index.store.collection import Collection
from index.store.unit import finished_units
from pretrain.run import RunFolder
from slurm import records
from slurm.__main__ import main
from tests.cluster.cluster import Cluster
from tests.tiny import recipe_data, write_recipe, write_shards

PARTS, SAMPLES_A_PART = 12, 5
WAIT_S = 300.0


class Pipeline:
    """A tiny one, whose embedding is an array of an element a tar."""

    def __init__(self, place: Path, cluster: Cluster, parts: int = PARTS) -> None:
        self.out, self.cluster, self.parts = place / "pipe", cluster, parts
        self.shards = write_shards(place / "shards", samples=SAMPLES_A_PART * parts, shards=parts)
        self.run = RunFolder(place / "run")
        self.recipe = write_recipe(place / "r.yaml", recipe_data(self.shards, self.run.path, steps=2))
        self.profile = place / "site.yaml"
        self.profile.write_text("cpus_per_rank: 1\nminutes: 30\nenv: {OMP_NUM_THREADS: '1'}\n")

    def __call__(self, *flags: str) -> int:
        given = ("--shards", self.shards, "--out", self.out, "--profile", self.profile, "--tasks", "retrieval", *flags)
        return main(["pipeline", str(self.recipe), "--parts", str(self.parts), "--parallel", "4", *map(str, given)])

    def jobs(self, stage: str) -> list[str]:
        """Of every time that it was sent."""
        return [line["job"] for line in records.submissions(self.out / "slurm") if line["name"] == stage]

    def began(self) -> list[str]:
        return [attempt.job for attempt in records.attempts(self.out / "slurm")]

    def running(self, array: str) -> list[str]:
        """Elements of an array that have begun and not ended."""
        tried = records.attempts(self.out / "slurm")
        return [a.job for a in tried if a.job.startswith(f"{array}_") and a.how is None]

    def runs(self, stage: str) -> list[str]:
        """Jobs of a stage that run, by the queue."""
        told = self.cluster.run("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i %j")
        jobs = dict(line.split() for line in told.splitlines())
        return [job for job, name in jobs.items() if name == (f"tiny-{stage}" if stage != "train" else "tiny")]

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


def assert_every_row_once(pipeline: Pipeline) -> None:
    (embeddings,) = (pipeline.out / "embeddings").iterdir()
    units = finished_units(embeddings).values()
    assert len({unit.source for unit in units}) == len(units) == pipeline.parts
    manifest, segments = Collection(pipeline.out / "collection").open()
    keys = [str(key) for segment in segments for key in segment.meta["key"].to_pylist()]
    samples = SAMPLES_A_PART * pipeline.parts
    assert sorted(keys) == [f"s{i:04d}" for i in range(samples)]
    assert manifest.rows == manifest.members == samples
