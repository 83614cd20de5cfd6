"""Which jobs go back into the queue, and how often. scontrol is a script that keeps what it is told."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from submitit.core.utils import DelayedSubmission, JobPaths

from slurm import comeback, records, requeue
from slurm.train_job import TrainJob
from slurm.work import _call

MOST = 2
BACK = "show job 42\nrequeue 42\n"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What scontrol was told; this process is the first task of job 42."""
    bin_, file = tmp_path / "bin", tmp_path / "told"
    bin_.mkdir()
    (bin_ / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {file}\n[ $1 = requeue ] || cat {tmp_path}/state\n')
    (bin_ / "scontrol").chmod(0o755)
    (tmp_path / "state").write_text("JobId=42 JobState=RUNNING Restarts=0")
    monkeypatch.setenv("PATH", f"{bin_}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    file.touch()
    return file


def started(run: Path, *starts: dict[str, Any]) -> None:
    (run / "run.json").write_text(json.dumps([{"slurm_job": "42", **start} for start in starts]))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that began once in this job, and was submitted as it is."""
    run = tmp_path / "run"
    records.append(run / "slurm", "began", job="42", restart=0, nodes=["n1"], silent=[])
    started(run, {"slurm_restart": 0})
    job = DelayedSubmission(TrainJob("r.yaml", str(run), MOST))
    job.dump(JobPaths(run / "slurm", "42").submitted_pickle)
    return run


def ended(run: Path, how: str) -> None:
    records.append(run / "slurm", "ended", job="42", restart=requeue.restarts(), how=how)


@pytest.mark.parametrize("code", [1, 85, 86, 137, 139, 143])
def test_what_trying_again_can_mend_is_tried_again(code: int, told: Path, run: Path) -> None:
    comeback.main(run / "slurm", code)
    assert told.read_text() == BACK
    (attempt,) = records.attempts(run / "slurm")
    assert attempt.how == f"requeued: exit code {code}"


@pytest.mark.parametrize("code", [75, 143])
def test_what_slurm_asked_for_is_done_whatever_the_exit_code(code: int, told: Path, run: Path) -> None:
    """Other ranks are ended by SIGTERM as the first leaves."""
    ended(run, requeue.REQUEUED)
    comeback.main(run / "slurm", code)
    assert told.read_text() == BACK


@pytest.mark.parametrize("code", [75, 143])
def test_what_a_person_asked_for_is_done_whatever_the_exit_code(code: int, told: Path, run: Path) -> None:
    ended(run, requeue.ENDED)
    comeback.main(run / "slurm", code)
    assert told.read_text() == ""


@pytest.mark.parametrize("code", [2, 87, 88])
def test_what_is_for_a_person_stays_away(code: int, told: Path, run: Path) -> None:
    comeback.main(run / "slurm", code)
    assert told.read_text() == ""


def test_a_run_that_refused_stays_away_whatever_the_others_ended_with(told: Path, run: Path, caplog) -> None:
    started(run, {"slurm_restart": 0, "ended": "refused"})
    comeback.main(run / "slurm", 85)
    assert told.read_text() == ""
    assert "the run has refused" in caplog.text


@pytest.mark.parametrize("how", ["stopped", "refused"])
def test_how_an_earlier_attempt_ended_is_past(how: str, told: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This one was killed before it began to train."""
    started(run, {"slurm_restart": 0, "ended": how})
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    told.with_name("state").write_text("JobId=42 JobState=RUNNING Restarts=1")
    records.append(run / "slurm", "began", job="42", restart=1, nodes=["n1"], silent=[])
    comeback.main(run / "slurm", 137)
    assert told.read_text() == BACK


def test_a_job_that_never_comes_to_train_is_left_to_a_person(
    told: Path, run: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    for restart in range(1, 1 + comeback.MOST_UNBEGUN):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        records.append(run / "slurm", "began", job="42", restart=restart, nodes=["n1"], silent=[])
    comeback.main(run / "slurm", 1)
    assert told.read_text() == ""
    assert "3 attempts have not come to train" in caplog.text
    started(run, {"slurm_restart": 2})
    assert comeback._why_not(comeback._task(run / "slurm", "42"), "42", 1) == ""  # one after a good one


def test_not_oftener_than_it_may(told: Path, run: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(MOST))
    comeback.main(run / "slurm", 85)
    assert told.read_text() == ""
    assert f"back into the queue {MOST} times" in caplog.text


@pytest.mark.parametrize("state", ["RUNNING Restarts=1", "PENDING Restarts=1", "CANCELLED Restarts=0"])
def test_neither_a_later_attempt_nor_a_cancelled_job_is_touched(state: str, told: Path, run: Path) -> None:
    """As when a node comes back that was given up, and its ranks find another attempt in the run."""
    told.with_name("state").write_text(f"JobId=42 JobState={state}")
    comeback.main(run / "slurm", 85)
    assert told.read_text() == "show job 42\n"


def test_a_controller_that_is_away_is_asked_again(
    told: Path, run: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setattr(requeue, "PAUSES_S", (0, 0.01, 0.01))
    told.with_name("state").write_text("")
    comeback.main(run / "slurm", 85)
    assert told.read_text() == "show job 42\n" * 3
    assert "Submit it again" in caplog.text


def test_an_element_of_an_array_comes_back(told: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "41")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    job = DelayedSubmission(_call, TrainJob("r.yaml", str(run), MOST))
    job.dump(JobPaths(run / "slurm", "41_7").submitted_pickle)
    comeback.main(run / "slurm", 85)
    assert told.read_text() == BACK.replace("42", "41_7")


ASKED = """
import os, signal, sys
from slurm import requeue
requeue.listen(print, alone=sys.argv[2] == "alone")
handed_on = sys.argv[2] == "handed on"
number = int(sys.argv[1])
signal.getsignal(number)(number, None) if handed_on else os.kill(os.getpid(), number)
print("goes on")
"""


@pytest.mark.parametrize(
    ("number", "rank", "by", "says", "code"),
    [
        (signal.SIGUSR2, 0, "Slurm", ["requeued"], 75),
        (signal.SIGUSR2, 1, "Slurm", ["goes on"], 0),
        (signal.SIGUSR1, 0, "Slurm", ["stopped"], 75),
        (signal.SIGUSR1, 1, "Slurm", ["goes on"], 0),
        (signal.SIGTERM, 0, "Slurm", [], 143),
        (signal.SIGTERM, 1, "Slurm", [], 143),
        (signal.SIGTERM, 0, "alone", ["requeued"], 75),
        (signal.SIGTERM, 0, "handed on", ["requeued"], 75),
        (signal.SIGTERM, 1, "handed on", ["goes on"], 0),
    ],
)
def test_a_signal(number: int, rank: int, by: str, says: list[str], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", str(rank))
    done = subprocess.run([sys.executable, "-c", ASKED, str(int(number)), by], capture_output=True, text=True)
    assert (done.stdout.splitlines(), done.returncode) == (says, code)
