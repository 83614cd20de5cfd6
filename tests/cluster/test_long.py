"""What takes longer: `make test-cluster-all`."""

from __future__ import annotations

import random
from pathlib import Path
from time import sleep

import pytest
import torch

from slurm import records
from slurm.__main__ import main
from tests.cluster.cluster import Cluster
from tests.cluster.runs import BACK_S, START_S, Run, assert_same
from tests.runs import losses
from tests.tiny import VIT

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.mark.parametrize("time", range(20))
def test_a_node_is_lost_at_any_moment(
    time: int, ddp: dict[str, torch.Tensor], tmp_path: Path, shards: Path, slurm: Cluster
) -> None:
    draw = random.Random(time)
    run = Run(tmp_path, shards, slurm, backend="ddp")
    run.submit("--nodes", "2")
    slurm.wait_for(run.trains, START_S, f"job {run.job} to train: {run.told()}")
    sleep(draw.uniform(0, 4))
    slurm.crash(draw.choice(records.attempts(run.folder / "slurm")[-1].nodes))
    slurm.wait_for(run.came_back_or_ended, BACK_S, f"job {run.job} to come back: {run.told()}")
    slurm.revive()
    run.wait_done()
    assert_same(run, ddp)


def test_the_time_limit_costs_not_a_step(tmp_path: Path, shards: Path, slurm: Cluster) -> None:
    run = Run(tmp_path, shards, slurm, backend="ddp", steps=1_000_000)
    run.submit("--nodes", "2", "--minutes", "2")
    run.wait_back()
    slurm.wait_for(lambda: len(run.logged()) == 2, START_S, f"job {run.job} to train again: {run.told()}")
    first, _ = run.logged()
    assert run.resumed() == [first[-1]]
    assert main(["cancel", str(run.folder), "--save-first"]) == 0
    assert run.saved()[-1] == run.logged()[-1][-1]


def test_the_controller_is_away_for_a_while(
    ddp: dict[str, torch.Tensor], tmp_path: Path, shards: Path, slurm: Cluster
) -> None:
    run = Run(tmp_path, shards, slurm, backend="ddp")
    run.submit("--nodes", "2")
    run.wait_saved()
    slurm.stop_controller()
    sleep(5)
    slurm.start_controller()
    run.wait_done()
    assert slurm.restarts(run.job) == 0
    assert_same(run, ddp)


def test_the_accounting_is_away_for_a_while(
    ddp: dict[str, torch.Tensor], tmp_path: Path, shards: Path, slurm: Cluster
) -> None:
    run = Run(tmp_path, shards, slurm, backend="ddp")
    run.submit("--nodes", "2")
    run.wait_saved()
    slurm.stop_database()
    slurm.run("scontrol", "requeue", run.job)
    run.wait_back()
    assert main(["status", str(run.folder)]) == 0
    run.wait_done()
    slurm.start_database()
    assert_same(run, ddp)


def test_one_node_fewer_sees_the_same_samples(tmp_path: Path, shards: Path, slurm: Cluster) -> None:
    """Two nodes of three are lost, and the run is told to go on with what is left."""
    alone = Run(tmp_path / "alone", shards, slurm, model=VIT)
    alone.submit("--nodes", "1")
    alone.wait_done()
    run = Run(tmp_path, shards, slurm, model=VIT)
    run.submit("--nodes", "2")
    run.wait_saved()
    (first,) = records.attempts(run.folder / "slurm")
    idle = ({"n1", "n2", "n3"} - set(first.nodes)).pop()
    slurm.crash(idle)
    slurm.crash(first.nodes[-1])
    slurm.wait_for(lambda: slurm.state(run.job) == "PENDING", BACK_S, "the job to wait for nodes that are gone")
    assert main(["requeue", str(run.folder), "--nodes", "1", "--limit-s", "60"]) == 0
    run.job = records.submissions(run.folder / "slurm")[-1]["job"]
    run.wait_done()
    tried = records.attempts(run.folder / "slurm")
    assert [len(attempt.nodes) for attempt in tried] == [2, 1]
    expected, found = losses(alone.folder), losses(run.folder)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-5)
