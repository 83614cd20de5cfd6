"""The last line of a job's script: does it go back into the queue? `python -m slurm.comeback FOLDER CODE`.

It stands behind the tasks, on the job's first node and outside of containers, where scontrol is, and where a job is
still at hand whose tasks were all killed. What the tasks were asked to do they have noted. Of training, what trying
again can mend (a rank that was killed or hung, a network or a GPU that failed, a node that Slurm still takes for alive)
is tried again, as often as the job may; what a person must put right first is not.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import cast

import submitit

from pretrain.exit_codes import FINAL
from pretrain.run import RunFolder
from slurm import records, requeue
from slurm.stage_job import StageJob
from slurm.train_job import TrainJob

log = logging.getLogger(__name__)

MOST_UNBEGUN = 3
"""Attempts of a job, one after another, that ended before training began; then it is left to a person."""


def main(folder: Path, code: int) -> None:
    """Put this job, whose tasks ended with `code`, back into the queue where that is right."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the requeue ends this script by it
    job = requeue.job_id()
    if job is None:
        return
    task = _task(folder, job)
    how = _how(task, job)
    if how == requeue.ENDED:
        return
    if how != requeue.REQUEUED and (why_not := _why_not(task, job, code)):
        log.warning(f"job {job} ended with exit code {code}, and does not go back into the queue: {why_not}")
    elif requeue.put_back(job, task.max_restarts) and how != requeue.REQUEUED:
        told = f"{requeue.REQUEUED}: exit code {code}"
        records.append(task.folder, "ended", job=job, restart=requeue.restarts(), how=told)


def _task(folder: Path, job: str) -> TrainJob | StageJob:
    """What the job does, as it was sent."""
    sent = submitit.core.utils.DelayedSubmission.load(submitit.core.utils.JobPaths(folder, job).submitted_pickle)
    return cast("TrainJob | StageJob", sent.args[0] if sent.args else sent.function)


def _how(task: TrainJob | StageJob, job: str) -> str | None:
    """What this attempt has noted of its end."""
    tried = {(attempt.job, attempt.restart): attempt.how for attempt in records.attempts(task.folder)}
    return tried.get((job, requeue.restarts()))


def _why_not(task: TrainJob | StageJob, job: str, code: int) -> str:
    if isinstance(task, StageJob):
        return "the same command sends it again"
    if code in FINAL:
        return "its log says what to do"
    began = [start for start in RunFolder(task.run).starts() if start.get("slurm_job") == job]
    restart = requeue.restarts()
    if began and began[-1]["slurm_restart"] == restart and began[-1].get("ended") in ("refused", "stopped", "done"):
        return f"the run has {began[-1]['ended']}: its log says why"
    newest = began[-1]["slurm_restart"] if began else -1
    tried = [a for a in records.attempts(task.folder) if a.job == job and newest < a.restart <= restart]
    return f"{len(tried)} attempts have not come to train" if len(tried) >= MOST_UNBEGUN else ""


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(Path(sys.argv[1]), int(sys.argv[2]))
