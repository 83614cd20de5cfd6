"""After the tasks of a training job have ended: does it go back into the queue? `python -m slurm.comeback FOLDER CODE`.

The last line of a job's script, on its first node, where also a job is still at hand whose ranks were all killed. What
trying again can mend (a rank that was killed or hung, a network or a GPU that failed, a node that Slurm still takes for
alive) is tried again, as often as the job may; what a person must put right first is not.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import submitit

from pretrain.exit_codes import DONE, FINAL, STOPPED
from pretrain.run import RunFolder
from slurm import records, requeue
from slurm.train_job import TrainJob

log = logging.getLogger(__name__)

MOST_UNBEGUN = 3
"""Attempts of a job that ended before training began, after which it is left to a person."""


def main(folder: Path, code: int) -> int:
    """Put this job back where that is right; `code`, which the job ends with."""
    job = requeue.job_id()
    if job is not None and code not in (DONE, STOPPED, *FINAL):
        task = _task(folder, job)
        why_not = _why_not(task, job)
        if why_not:
            log.warning(f"job {job} ended with exit code {code}, and is not put back into the queue: {why_not}")
        elif requeue.put_back(job, task.max_restarts):
            records.append(Path(task.run) / "slurm", "ended", job=job, restart=requeue.restarts(), how=_how(code))
    return code


def _task(folder: Path, job: str) -> TrainJob:
    """What the job does, as it was sent."""
    sent = submitit.core.utils.DelayedSubmission.load(submitit.core.utils.JobPaths(folder, job).submitted_pickle)
    return sent.function if isinstance(sent.function, TrainJob) else sent.args[0]


def _why_not(task: TrainJob, job: str) -> str:
    starts = RunFolder(Path(task.run)).starts()
    if starts and starts[-1].get("ended") in ("refused", "done", "stopped"):
        return f"the run has {starts[-1]['ended']}: its log says why"
    here = os.environ.get("SLURM_JOB_ID")
    tried = sum(attempt.job == job for attempt in records.attempts(Path(task.run) / "slurm"))
    if tried - sum(start.get("slurm_job_id") == here for start in starts) >= MOST_UNBEGUN:
        return f"{MOST_UNBEGUN} attempts have not come to train"
    return ""


def _how(code: int) -> str:
    return f"requeued: exit code {code}"


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
