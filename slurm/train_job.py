"""What every task of a training job does: it becomes a rank, trains, and leaves the job so that Slurm goes on right."""

from __future__ import annotations

import os
import signal
import sys
import zlib
from pathlib import Path

import submitit

from pretrain.exit_codes import DONE, STOPPED
from slurm import records, requeue
from slurm.logfile import heading

PORTS = range(20_000, 32_000)
"""For the ranks' meeting: below those that the kernel gives to outgoing connections."""


class TrainJob:
    """One rank a task; submitit keeps it with the job, so that one that comes back goes on from the newest save.

    recipe_file: the resolved recipe. run: its folder. folder: of the job's records. max_restarts:
    times it goes back into the queue.
    """

    def __init__(self, recipe_file: str, run: str, max_restarts: int) -> None:
        self.recipe_file, self.run, self.max_restarts = recipe_file, Path(run), max_restarts
        self.folder = self.run / "slurm"

    def __call__(self) -> None:
        from pretrain.__main__ import main  # only now: whoever submits a job needs no torch

        place = submitit.JobEnvironment()
        first, inside_slurm = place.global_rank == 0, place.cluster == "slurm"
        os.environ.update(meeting(place))
        print(heading(place.job_id, requeue.restarts(), place.global_rank, place.hostname), file=sys.stderr, flush=True)
        if inside_slurm:
            requeue.listen(self._ended)
        if first:
            self._began(place)
        code = main(["train", self.recipe_file])
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # another task has ended, and Slurm ends the step with it
        if code == STOPPED and inside_slurm and not first:
            sys.exit(DONE)  # the first rank says how the job ends
        if first:
            self._ended({DONE: "done", STOPPED: "stopped"}.get(code, f"failed: exit code {code}"))
        if code:
            sys.exit(code)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit where there is no Slurm to put it back into a queue: the same job again."""
        return submitit.helpers.DelayedSubmission(self)

    def _began(self, place: submitit.JobEnvironment) -> None:
        from slurm.suspects import silent

        records.append(
            self.folder, "began", job=place.job_id, restart=requeue.restarts(), nodes=list(place.hostnames),
            silent=silent(self.run, self.folder),
        )  # fmt: skip

    def _ended(self, how: str) -> None:
        job = submitit.JobEnvironment().job_id
        records.append(self.folder, "ended", job=job, restart=requeue.restarts(), how=how)


def meeting(place: submitit.JobEnvironment) -> dict[str, str]:
    """The variables that ranks find each other by: the first node, and a port that no other attempt of this job has."""
    attempt = f"{place.job_id}.{requeue.restarts()}"
    return {
        "MASTER_ADDR": place.hostnames[0],
        "MASTER_PORT": str(PORTS[zlib.crc32(attempt.encode()) % len(PORTS)]),
        "WORLD_SIZE": str(place.num_tasks),
        "RANK": str(place.global_rank),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.num_tasks // place.num_nodes),
    }
