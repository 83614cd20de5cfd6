"""A command of polyview as a job, or as one element of an array that shares the work."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import submitit

from slurm import requeue


class CommandJob:
    """`polyview ARGV`. share: (this one, of so many), where the command deals its work out by rank.

    A job that ends for its time, or is preempted, goes back into the queue: what the commands write is whole or not
    there, and what is there is not done again.
    """

    def __init__(self, argv: Sequence[str], max_restarts: int, share: tuple[int, int] = (0, 1)) -> None:
        self.argv, self.max_restarts, self.share = list(argv), max_restarts, share

    def __call__(self) -> None:
        import polyview

        os.environ.update(RANK=str(self.share[0]), WORLD_SIZE=str(self.share[1]))
        if submitit.JobEnvironment().cluster == "slurm":
            requeue.listen(self.max_restarts, self.note)
        if code := polyview.main(self.argv):
            sys.exit(code)

    def note(self, how: str) -> None:
        """Told how a job ends that is asked to: requeued, or stopped."""

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit where there is no Slurm: the same again."""
        return submitit.helpers.DelayedSubmission(self)
