"""Training on a real Slurm comes back after every failure, with the weights of an undisturbed run, to the bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from pretrain.telemetry import read_events
from pretrain.telemetry.alive import heartbeats
from pretrain.telemetry.runlog import read_lines
from slurm import records
from slurm.__main__ import main
from tests.cluster.cluster import Cluster
from tests.runs import weights
from tests.tiny import RESNET, recipe_data, write_recipe, write_shards

pytestmark = pytest.mark.cluster

STEPS, EVERY = 60, 5
START_S, BACK_S, END_S = 120.0, 150.0, 240.0


class Run:
    """A tiny run, and its job."""

    def __init__(self, folder: Path, shards: Path, cluster: Cluster, **changes: object) -> None:
        self.folder, self.cluster = folder / "run", cluster
        data = recipe_data(
            shards, self.folder, steps=STEPS, checkpoint={"every": EVERY}, model=RESNET, faults={"heartbeat_s": 0.5},
            **changes,
        )  # fmt: skip
        self.recipe = write_recipe(folder / "recipe.yaml", data)
        self.job = ""

    def submit(self, *flags: str) -> None:
        profile = self.recipe.with_name("site.yaml")
        profile.write_text("cpus_per_rank: 1\nminutes: 30\nenv: {OMP_NUM_THREADS: '1'}\n")
        assert main(["submit", str(self.recipe), "--profile", str(profile), *flags]) == 0
        self.job = records.submissions(self.folder / "slurm")[-1]["job"]

    def wait_saved(self, since: int = 0) -> None:
        """Until a checkpoint behind step `since` is whole."""

        def saved() -> bool:
            return any(step > since for step in self.saved())

        self.cluster.wait_for(saved, START_S, f"a save of job {self.job}: {self.told()}")

    def saved(self) -> list[int]:
        names = self.folder.glob("checkpoints/step_*/manifest.json")
        return sorted(int(name.parent.name.removeprefix("step_")) for name in names)

    def wait_back(self, times: int = 1) -> None:
        """Until it runs again."""

        def back() -> bool:
            return self.cluster.restarts(self.job) >= times and self.cluster.state(self.job) == "RUNNING"

        self.cluster.wait_for(back, BACK_S, f"job {self.job} to run again: {self.told()}")

    def wait_done(self) -> None:
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.cluster.wait_for(lambda: self.cluster.state(self.job) in over, END_S, f"job {self.job}: {self.told()}")
        assert self.cluster.state(self.job) == "COMPLETED", self.told()

    def resumed(self) -> list[int]:
        return [event["step"] for event in read_events(self.folder) if event["event"] == "resume"]

    def logged(self) -> list[list[int]]:
        """Steps in the log, of each start."""
        starts: list[list[int]] = []
        for line in read_lines(self.folder / "log.jsonl"):
            if line.get("event") in ("start", "resume"):
                starts.append([])
            elif "event" not in line:
                starts[-1].append(line["step"])
        return starts

    def told(self) -> str:
        logs = sorted((self.folder / "slurm").glob(f"{self.job}_*_log.err"))
        return "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in logs)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


def undisturbed(folder: Path, shards: Path, cluster: Cluster, backend: str) -> dict[str, torch.Tensor]:
    """Weights, optimizer and objectives of the same recipe on the same nodes, left alone."""
    os.environ.update(cluster.env)
    run = Run(folder, shards, cluster, backend=backend)
    run.submit("--nodes", "2")
    run.wait_done()
    assert run.resumed() == []
    return weights(run.folder)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory, shards: Path, cluster: Cluster) -> dict[str, torch.Tensor]:
    return undisturbed(tmp_path_factory.mktemp("ddp"), shards, cluster, "ddp")


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory: pytest.TempPathFactory, shards: Path, cluster: Cluster) -> dict[str, torch.Tensor]:
    return undisturbed(tmp_path_factory.mktemp("fsdp2"), shards, cluster, "fsdp2")


def assert_same(run: Run, expected: dict[str, torch.Tensor]) -> None:
    found = weights(run.folder)
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different


def test_a_node_is_lost(ddp: dict[str, torch.Tensor], tmp_path: Path, shards: Path, slurm: Cluster) -> None:
    run = Run(tmp_path, shards, slurm, backend="ddp")
    run.submit("--nodes", "2")
    run.wait_saved()
    lost = records.attempts(run.folder / "slurm")[-1].nodes[-1]
    slurm.crash(lost)
    run.wait_back()
    run.wait_done()
    assert run.resumed()[0] >= EVERY
    assert_same(run, ddp)
    first, second = records.attempts(run.folder / "slurm")
    assert second.how == "done"
    assert lost not in second.nodes
    assert first.silent == [lost]


def test_an_operator_requeues_it(ddp: dict[str, torch.Tensor], tmp_path: Path, shards: Path, slurm: Cluster) -> None:
    run = Run(tmp_path, shards, slurm, backend="ddp")
    run.submit("--nodes", "2")
    run.wait_saved()
    slurm.run("scontrol", "requeue", run.job)
    run.wait_back()
    run.wait_done()
    assert run.resumed()[0] >= EVERY
    assert_same(run, ddp)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed(
    rank: int, ddp: dict[str, torch.Tensor], tmp_path: Path, shards: Path, slurm: Cluster
) -> None:
    """As by a node that runs out of memory: nobody asks for another try but the job itself."""
    run = Run(tmp_path, shards, slurm, backend="ddp")
    run.submit("--nodes", "2")
    run.wait_saved()
    sign = heartbeats(run.folder)[rank]
    slurm.run("srun", "--overlap", f"--jobid={run.job}", "-N1", "-n1", "-w", sign["host"], "kill", "-9", sign["pid"])
    run.wait_back()
    run.wait_done()
    assert run.resumed()[0] >= EVERY
    assert_same(run, ddp)


def test_usr2_saves_and_requeues(fsdp2: dict[str, torch.Tensor], tmp_path: Path, shards: Path, slurm: Cluster) -> None:
    run = Run(tmp_path, shards, slurm, backend="fsdp2")
    run.submit("--nodes", "2")
    run.wait_saved()
    slurm.run("scancel", f"--signal={signal.SIGUSR2.name}", run.job)
    run.wait_back()
    run.wait_done()
    first, _ = run.logged()
    assert run.resumed() == [first[-1]]  # not a step is done twice
    assert_same(run, fsdp2)
    assert [attempt.how for attempt in records.attempts(run.folder / "slurm")] == ["requeued", "done"]


def test_a_partition_that_goes_first_takes_the_nodes(
    fsdp2: dict[str, torch.Tensor], tmp_path: Path, shards: Path, slurm: Cluster
) -> None:
    run = Run(tmp_path, shards, slurm, backend="fsdp2")
    run.submit("--nodes", "2")
    run.wait_saved()
    assert len(slurm.run("srun", "--partition=high", "-N3", "--exclusive", "hostname").split()) == 3
    run.wait_back()
    run.wait_done()
    first, _ = run.logged()
    assert run.resumed() == [first[-1]]
    assert_same(run, fsdp2)


def test_a_cancelled_job_stays_away(tmp_path: Path, shards: Path, slurm: Cluster) -> None:
    run = Run(tmp_path, shards, slurm, backend="ddp")
    run.submit("--nodes", "1")
    run.wait_saved()
    slurm.run("scancel", run.job)
    slurm.wait_for(lambda: run.job not in slurm.jobs(), 60, "the end of the job")
    assert slurm.state(run.job) == "CANCELLED"
    assert slurm.restarts(run.job) == 0
