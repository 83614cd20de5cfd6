"""A job goes back into the queue: what its tasks do when Slurm asks them to end, and what then tells Slurm.

Slurm sends SIGUSR2 some time before the limit and, on most sites, before a preemption; SIGTERM before a preemption, at
`scancel`, and to the other tasks of a step when one of them has failed. SIGUSR1 is `slurm cancel --save-first`: the run
saves and is over. Training takes all of them over while it runs, saves on all ranks at one step, and then hands them on
to what is set up here. A task only notes what it was asked and ends; the script's last line (`slurm.comeback`) acts.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from pretrain.exit_codes import STOPPED
from pretrain.telemetry.provenance import slurm_attempt

log = logging.getLogger(__name__)

REQUEUED, ENDED = "requeued", "stopped"
"""What a job notes that goes back into the queue, and one that does not."""
PAUSES_S = (0, 2, 10, 30, 60)
"""Before the controller is asked again: one that restarts, or changes over, is back by then."""
SCONTROL_S = 60


def restarts() -> int:
    """Times that this job was put back into the queue."""
    return slurm_attempt().get("slurm_restart", 0)


def job_id() -> str | None:
    """This job as Slurm's commands take it: `42`, of an array `42_7`; None outside of Slurm."""
    return slurm_attempt().get("slurm_job")


def listen(note: Callable[[str], None], *, alone: bool = False) -> None:
    """From here on signals end this task, and the first task of the job notes by `note` what is to become of it.

    SIGUSR2: back into the queue; SIGUSR1: the end. SIGTERM means either only where training has saved for it; else it
    may be the step's end because another task failed, and how that one ended decides. The other tasks of a job wait for
    Slurm to end them. alone: there are no others.
    """
    first = int(os.environ.get("SLURM_PROCID", "0")) == 0

    def asked(number: int, frame: object) -> None:
        from_slurm = frame is not None  # training hands on what it has saved for without a frame
        if number == signal.SIGTERM and from_slurm and not alone:
            sys.exit(128 + number)
        if first:
            note(ENDED if number == signal.SIGUSR1 else REQUEUED)
            sys.exit(STOPPED)

    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, asked)


def put_back(job: str, most: int) -> bool:
    """Put this job, which is at its end, back into the queue; whether it is there.

    Not oftener than `most` times, not one that somebody cancelled, and not when a later attempt runs already: this one
    may have been given up long ago, on a node that nobody could reach.
    """
    if restarts() >= most:
        log.warning(f"job {job} was put back into the queue {most} times, and is not again (--max-restarts)")
        return False
    said = ""
    for pause_s in PAUSES_S:
        time.sleep(pause_s)
        shown = _scontrol("show", "job", job)
        state, count = re.search(r"JobState=(\w+)", shown), re.search(r"Restarts=(\d+)", shown)
        if state is None or count is None:
            said = shown
        elif state[1] == "CANCELLED":
            return False
        elif state[1] == "PENDING" or int(count[1]) != restarts() or not (said := _scontrol("requeue", job)):
            return True
    log.warning(f"job {job} is not put back into the queue: {said}. Submit it again, it goes on from its newest save")
    return False


def _scontrol(*words: str) -> str:
    """What it says; "" where it does what it was told to."""
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=SCONTROL_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout.strip() or done.stderr.strip()
