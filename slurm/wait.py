"""How a job ended: waited for."""

from __future__ import annotations

import re
import time
from typing import Any

import submitit

from pretrain.errors import UserError
from pretrain.exit_codes import CRASHED, DONE
from slurm import queue, records
from slurm.work import Cluster, Work

POLL_S = 2.0
OVER = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
)  # fmt: skip
FORGOTTEN = "Invalid job id"
"""Begins what the controller says of a job that it knows no more; whatever else it says is none about the job."""


def outcome(work: Work, job: submitit.Job[Any], cluster: Cluster) -> int:
    """The exit code of a job, once it will not come back into the queue; 1 where it has none (cancelled)."""
    if cluster == "local":
        job._process.wait()  # type: ignore[attr-defined]
        ends = [a.how or "" for a in records.attempts(work.folder) if a.job == job.job_id]
        return DONE if ends and ends[-1] == "done" else _code(ends[-1] if ends else "")
    while True:
        state, code = _state(job.job_id)
        if state in OVER:
            return code if state in ("COMPLETED", "FAILED") else code or CRASHED
        time.sleep(POLL_S)


def _code(how: str) -> int:
    found = re.search(r"exit code (\d+)", how)
    return int(found[1]) if found else CRASHED


def _state(job: str) -> tuple[str, int]:
    """State and exit code by the controller, which may be silent for a while, or, of a job that it knows no more, by
    the accounting."""
    try:
        shown = queue.ask("scontrol", "--oneliner", "show", "job", job)
    except UserError as error:
        return _forgotten(job) if FORGOTTEN in str(error) else ("UNKNOWN", CRASHED)
    state = re.search(r"JobState=(\w+)", shown)
    code = re.search(r" ExitCode=(\d+):(\d+)", shown)
    signalled = 128 + int(code[2]) if code and int(code[2]) else 0
    return state[1] if state else "UNKNOWN", (int(code[1]) or signalled) if code else CRASHED


def _forgotten(job: str) -> tuple[str, int]:
    """How a job ended that the controller knows no more: it will not come back, whatever it was seen doing last."""
    state = queue.ended([job]).get(job, "")
    return (state, DONE) if state == "COMPLETED" else ("CANCELLED", CRASHED)
