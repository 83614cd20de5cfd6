"""W&B really, without a network: two starts are one run, nothing is said, nothing stays, and its end is not ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ENVIRONMENT

STARTS = """
import io, json, os, signal, subprocess, sys
from pathlib import Path
from pretrain.recipe import Recipe
from pretrain.telemetry import RunLog
from tests import tiny

run, kill = Path(sys.argv[1]), sys.argv[2] == "kill"
data = tiny.recipe_data(Path("none"), run)
recipe = Recipe.model_validate(data | {"log": {"tensorboard": False, "wandb": {"project": "p", "mode": "offline"}}})
children = lambda: subprocess.run(["pgrep", "-P", str(os.getpid()), "-x", "wandb-core"], capture_output=True, text=True)
for resume in (None,) if kill else (None, 2):
    log = RunLog(run, total_steps=8, resume_step=resume, tensorboard=False, recipe=recipe, stream=io.StringIO())
    for step in range(1, 200):
        if kill and step == 3:
            for pid in children().stdout.split():
                os.kill(int(pid), signal.SIGKILL)
        log.step(step, {"loss": 1234.5678, "grad_norm": None})
    log.close()
print(json.dumps({"left": children().stdout.split()}))
"""


def begin(run: Path, kill: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", STARTS, str(run), kill], capture_output=True, text=True, timeout=200, env=ENVIRONMENT
    )


def test_two_starts_are_one_run_and_leave_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = begin(tmp_path, "no")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout) == {"left": []}
    name = (tmp_path / "wandb_id").read_text().strip()
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    assert all(b"1234.5678" in file.read_bytes() for file in files)


def test_its_end_is_one_warning_and_not_the_runs(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = begin(tmp_path, "kill")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 200
    assert done.stderr.count("it gets no more until the next start") <= 2, done.stderr
