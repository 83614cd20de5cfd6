"""How a job ended, by a controller that knows it, has forgotten it, or does not answer for a while."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import submitit

from slurm import wait
from slurm.profile import Profile
from slurm.wait import outcome
from slurm.work import Resources, Work

SCONTROL = """#!/bin/sh
cd {folder}/answers
set -- *
mv $1 ../now
[ $# -gt 1 ] || cp ../now $1
. ../now
"""

# of what `scontrol --oneliner show job` prints what is looked at, and its errors as libslurm words them
RUNS = "echo 'JobId=42 JobName=a JobState=RUNNING Reason=None Requeue=1 ExitCode=0:0 RunTime=00:00:01'"
FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
AWAY = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"


def ended(state: str, code: str) -> str:
    return f"echo 'JobId=42 JobName=a JobState={state} Reason=None Requeue=1 ExitCode={code} RunTime=00:00:01'"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("bin", "answers"):
        (tmp_path / name).mkdir()
    command(tmp_path, "scontrol", SCONTROL.format(folder=tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.defpath}")
    monkeypatch.setattr(wait, "POLL_S", 0.01)
    return tmp_path


def command(place: Path, name: str, text: str) -> None:
    (place / "bin" / name).write_text(text)
    (place / "bin" / name).chmod(0o755)


def code(place: Path, *answers: str, accounts: str = "") -> int:
    """What waiting for job 42 gives; scontrol gives one answer a call, the last one for ever."""
    for number, answer in enumerate(answers):
        (place / f"answers/{number}").write_text(answer + "\n")
    command(place, "sacct", f"#!/bin/sh\nprintf '{accounts}'\n")
    work = Work("a", place, [print], Resources(), Profile(), place, str(place))
    return outcome(work, submitit.SlurmJob(place, "42"), "slurm")


@pytest.mark.parametrize(
    ("state", "said", "expected"),
    [
        ("COMPLETED", "0:0", 0), ("FAILED", "87:0", 87), ("FAILED", "0:9", 137), ("TIMEOUT", "0:0", 1),
        ("PREEMPTED", "0:0", 1), ("REVOKED", "0:0", 1), ("CANCELLED", "0:15", 143),
    ],
)  # fmt: skip
def test_by_the_controller(place: Path, state: str, said: str, expected: int) -> None:
    assert code(place, RUNS, ended(state, said)) == expected


def test_a_controller_that_is_away_for_a_while_is_asked_again(place: Path) -> None:
    assert code(place, RUNS, AWAY, AWAY, RUNS, ended("COMPLETED", "0:0"), accounts="42|CANCELLED\\n") == 0


@pytest.mark.parametrize(
    ("accounts", "expected"), [("42|REQUEUED\\n42|COMPLETED\\n", 0), ("42|FAILED\\n", 1), ("42|RUNNING\\n", 1), ("", 1)]
)
def test_a_job_that_is_forgotten_is_over(place: Path, accounts: str, expected: int) -> None:
    assert code(place, RUNS, FORGOTTEN, accounts=accounts) == expected
