"""A job puts itself back into the queue: when Slurm asks it to end, and not oftener than it may.

Slurm sends SIGUSR2 some time before the limit and, on most sites, before a preemption; SIGTERM before a preemption, and
at `scancel`. SIGUSR1 is `slurm cancel --save-first`: the run saves and is over. Training takes all of them over while
it runs, saves on all ranks at one step, and hands them on to what is set up here.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable

from pretrain.exit_codes import STOPPED

log = logging.getLogger(__name__)

SCONTROL_S = 60
"""Seconds that the controller has to answer."""


def restarts() -> int:
    """Times that this job was put back into the queue."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def job_id() -> str | None:
    """This job as Slurm's commands take it: `42`, of an array `42_7`; None outside of Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def listen(most: int, note: Callable[[str], None] = lambda how: None) -> None:
    """From here on SIGUSR2 and SIGTERM put this job back into the queue, at most `most` times, and end this task.

    One task of a job does it, the first; the others stay until Slurm ends them. note: told how it ends, before.
    """

    def asked(number: int, _frame: object) -> None:
        if int(os.environ.get("SLURM_PROCID", "0")) == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the requeue itself ends this task by it
            note("requeued" if _again(number, most) else "stopped")
            sys.exit(STOPPED)

    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, asked)


def _again(number: int, most: int) -> bool:
    job = job_id()
    return job is not None and (number != signal.SIGTERM or _wanted(job)) and put_back(job, most)


def put_back(job: str, most: int) -> bool:
    """Put this job back into the queue, unless that was done `most` times; whether it was done."""
    if restarts() >= most:
        log.warning(f"job {job} was put back into the queue {most} times, and is not again (--max-restarts)")
        return False
    return _requeue(job)


def _wanted(job: str) -> bool:
    """Whether Slurm still means this job to run: not one that somebody has cancelled."""
    try:
        shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, timeout=SCONTROL_S)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "JobState=RUNNING" in shown.stdout


def _requeue(job: str) -> bool:
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=SCONTROL_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning(f"job {job} cannot be put back into the queue: {error}; submit it again, it goes on from its save")
        return False
    if done.returncode > 0:  # below 0: the requeue ended its own messenger
        log.warning(f"job {job} is not put back into the queue: {done.stderr.strip()}; submit it again")
    return done.returncode <= 0
