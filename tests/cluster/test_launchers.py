"""The documented sbatch files, for those who start torchrun or accelerate themselves: submitted as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.telemetry import read_events
from tests.cluster.cluster import Cluster
from tests.runs import losses
from tests.tiny import recipe_data, write_recipe, write_shards

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

FILES = Path(__file__).parents[2] / "docs" / "slurm"
STEPS = 40


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_ranks_of_two_nodes_train_save_when_told_and_come_back(
    launcher: str, slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, run = write_shards(tmp_path / "shards"), tmp_path / "run"
    data = recipe_data(shards, run, steps=STEPS, checkpoint={"every": 10})
    recipe, log = write_recipe(tmp_path / "r.yaml", data), tmp_path / "log"
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = subprocess.run(
        ["sbatch", "--parsable", f"--output={log}", FILES / f"{launcher}.sbatch", recipe],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip

    def saved() -> bool:
        return any(run.glob("checkpoints/*/manifest.json"))

    def over() -> bool:
        return slurm.state(job) in ("COMPLETED", "FAILED", "CANCELLED")

    slurm.wait_for(saved, 150, f"a save: {log}")
    slurm.run("scancel", "--batch", "--signal=USR2", job)
    slurm.wait_for(lambda: slurm.restarts(job) == 1, 90, f"the job to be requeued: {log}")
    slurm.wait_for(over, 240, f"the end of the job: {log}")
    assert slurm.state(job) == "COMPLETED", log.read_text()
    assert list(losses(run)) == list(range(1, STEPS + 1))
    events = [event["event"] for event in read_events(run) if event["event"] != "save"]
    assert events == ["start", "stop", "resume", "end"]
