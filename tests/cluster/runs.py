"""A tiny run as a job on the cluster, watched from outside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.telemetry import read_events
from pretrain.telemetry.runlog import read_lines
from slurm import records
from slurm.__main__ import main
from tests.cluster.cluster import Cluster
from tests.runs import weights
from tests.tiny import RESNET, recipe_data, write_recipe

STEPS, EVERY = 60, 5
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
START_S, BACK_S, END_S = 120.0, 150.0, 240.0


class Run:
    """A tiny run, and its job."""

    def __init__(self, folder: Path, shards: Path, cluster: Cluster, **changes: object) -> None:
        self.folder, self.cluster = folder / "run", cluster
        settings = {"steps": STEPS, "checkpoint": {"every": EVERY}, "model": RESNET, "faults": {"heartbeat_s": 0.5}}
        data = recipe_data(shards, self.folder, **(settings | changes))
        folder.mkdir(exist_ok=True)
        self.recipe = write_recipe(folder / "recipe.yaml", data)
        self.job = ""

    def submit(self, *flags: str) -> None:
        profile = self.recipe.with_name("site.yaml")
        profile.write_text("cpus_per_rank: 1\nminutes: 30\nsignal_s: 30\nenv: {OMP_NUM_THREADS: '1'}\n")
        assert main(["submit", str(self.recipe), "--profile", str(profile), *flags]) == 0
        self.job = records.submissions(self.folder / "slurm")[-1]["job"]

    def wait_saved(self, since: int = 0) -> None:
        """Until a checkpoint behind step `since` is whole."""

        def saved() -> bool:
            return any(step > since for step in self.saved())

        self.cluster.wait_for(saved, START_S, f"a save of job {self.job}: {self.told()}")

    def trains(self) -> bool:
        """Whether a step is logged."""
        log = self.folder / "log.jsonl"
        return log.is_file() and any(self.logged()[-1:])

    def came_back_or_ended(self) -> bool:
        return self.cluster.restarts(self.job) > 0 or self.cluster.state(self.job) in OVER

    def saved(self) -> list[int]:
        names = self.folder.glob("checkpoints/step_*/manifest.json")
        return sorted(int(name.parent.name.removeprefix("step_")) for name in names)

    def wait_back(self, times: int = 1) -> None:
        """Until it runs again."""

        def back() -> bool:
            return self.cluster.restarts(self.job) >= times and self.cluster.state(self.job) == "RUNNING"

        self.cluster.wait_for(back, BACK_S, f"job {self.job} to run again: {self.told()}")

    def wait_done(self) -> None:
        self.cluster.wait_for(lambda: self.cluster.state(self.job) in OVER, END_S, f"job {self.job}: {self.told()}")
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


def undisturbed(folder: Path, shards: Path, cluster: Cluster, backend: str) -> dict[str, torch.Tensor]:
    """Weights, optimizer and objectives of the same recipe on the same nodes, left alone."""
    run = Run(folder, shards, cluster, backend=backend)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in cluster.env.items():
            environment.setenv(name, value)
        run.submit("--nodes", "2")
    run.wait_done()
    assert run.resumed() == []
    return weights(run.folder)


def assert_same(run: Run, expected: dict[str, torch.Tensor]) -> None:
    found = weights(run.folder)
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different
