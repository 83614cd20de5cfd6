"""Training on a real Slurm comes back after every failure, with the weights of an undisturbed run, to the bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from pretrain.telemetry.alive import heartbeats
from slurm import records
from tests.cluster.cluster import Cluster
from tests.cluster.runs import END_S, EVERY, Run, assert_same

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


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


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.long)])
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


def test_what_a_person_must_mend_stays_away(tmp_path: Path, shards: Path, slurm: Cluster) -> None:
    """A NaN on two ranks; as the first of them leaves, Slurm ends the other by SIGTERM."""
    run = Run(tmp_path, shards, slurm, objectives={"tests.poison": {"sample": 3}})
    run.submit("--nodes", "2")
    slurm.wait_for(lambda: slurm.state(run.job) in ("FAILED", "COMPLETED"), END_S, f"the job's end: {run.told()}")
    assert (slurm.state(run.job), slurm.restarts(run.job)) == ("FAILED", 0)
    assert "No weight was touched" in run.told()
    assert records.attempts(run.folder / "slurm")[-1].how in ("failed: exit code 87", "failed: exit code 85")


def test_a_cancelled_job_stays_away(tmp_path: Path, shards: Path, slurm: Cluster) -> None:
    run = Run(tmp_path, shards, slurm, backend="ddp")
    run.submit("--nodes", "1")
    run.wait_saved()
    slurm.run("scancel", run.job)
    slurm.wait_for(lambda: run.job not in slurm.jobs(), 60, "the end of the job")
    assert slurm.state(run.job) == "CANCELLED"
    assert slurm.restarts(run.job) == 0
