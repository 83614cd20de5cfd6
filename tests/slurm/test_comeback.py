"""Which jobs go back into the queue, and how often. scontrol is a script that keeps what it is told."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission, JobPaths

from slurm import comeback, records, requeue
from slurm.train_job import TrainJob

MOST = 2


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What scontrol was told; this process is the first task of job 42."""
    bin_, file = tmp_path / "bin", tmp_path / "told"
    bin_.mkdir()
    (bin_ / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {file}\ncat {tmp_path}/state\n')
    (bin_ / "scontrol").chmod(0o755)
    (tmp_path / "state").write_text("JobId=42 JobState=RUNNING Reason=None")
    monkeypatch.setenv("PATH", f"{bin_}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    file.touch()
    return file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that began once in this job, and was submitted as it is."""
    run = tmp_path / "run"
    records.append(run / "slurm", "began", job="42", restart=0, nodes=["n1"], silent=[])
    (run / "run.json").write_text(json.dumps([{"slurm_job_id": "42", "from_step": 0}]))
    job = DelayedSubmission(TrainJob("r.yaml", str(run), MOST))
    job.dump(JobPaths(run / "slurm", "42").submitted_pickle)
    return run


@pytest.mark.parametrize("code", [1, 85, 86, 137, 139])
def test_what_trying_again_can_mend_is_tried_again(code: int, told: Path, run: Path) -> None:
    assert comeback.main(run / "slurm", code) == code
    assert told.read_text() == "requeue 42\n"
    (attempt,) = records.attempts(run / "slurm")
    assert attempt.how == f"requeued: exit code {code}"


@pytest.mark.parametrize("code", [0, 2, 75, 87, 88])
def test_what_is_done_or_for_a_person_stays_away(code: int, told: Path, run: Path) -> None:
    assert comeback.main(run / "slurm", code) == code
    assert told.read_text() == ""


def test_a_run_that_refused_stays_away_whatever_the_others_ended_with(told: Path, run: Path, caplog) -> None:
    (run / "run.json").write_text(json.dumps([{"slurm_job_id": "42", "ended": "refused"}]))
    assert comeback.main(run / "slurm", 85) == 85
    assert told.read_text() == ""
    assert "the run has refused" in caplog.text


def test_a_job_that_never_comes_to_train_is_left_to_a_person(told: Path, run: Path, caplog) -> None:
    for restart in range(1, 1 + comeback.MOST_UNBEGUN):
        records.append(run / "slurm", "began", job="42", restart=restart, nodes=["n1"], silent=[])
    assert comeback.main(run / "slurm", 1) == 1
    assert told.read_text() == ""
    assert "3 attempts have not come to train" in caplog.text


def test_not_oftener_than_it_may(told: Path, run: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(MOST))
    assert comeback.main(run / "slurm", 85) == 85
    assert told.read_text() == ""
    assert f"back into the queue {MOST} times" in caplog.text


def test_an_element_of_an_array_puts_itself_back(told: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "41")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    from slurm.work import _call

    job = DelayedSubmission(_call, TrainJob("r.yaml", str(run), MOST))
    job.dump(JobPaths(run / "slurm", "41_7").submitted_pickle)
    assert comeback.main(run / "slurm", 85) == 85
    assert told.read_text() == "requeue 41_7\n"


ASKED = """
import os, signal, sys
from slurm import requeue
requeue.listen(2, print)
os.kill(os.getpid(), int(sys.argv[1]))
print("goes on")
"""


@pytest.mark.parametrize(
    ("number", "rank", "state", "how", "scontrol"),
    [
        (signal.SIGUSR2, 0, "RUNNING", "requeued", ["requeue 42"]),
        (signal.SIGTERM, 0, "RUNNING", "requeued", ["show job 42", "requeue 42"]),
        (signal.SIGTERM, 0, "CANCELLED", "stopped", ["show job 42"]),
        (signal.SIGUSR2, 1, "RUNNING", "goes on", []),
    ],
)
def test_a_signal(
    number: int, rank: int, state: str, how: str, scontrol: list[str], told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", str(rank))
    told.with_name("state").write_text(f"JobId=42 JobState={state} Reason=None")
    done = subprocess.run([sys.executable, "-c", ASKED, str(int(number))], capture_output=True, text=True)
    assert done.stdout.splitlines() == [how]
    assert done.returncode == (0 if rank else requeue.STOPPED)
    assert told.read_text().splitlines() == scontrol
