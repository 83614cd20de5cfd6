"""A stage of a pipeline, or one element of its array, as a job: a command of polyview, and the mark that it is done."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

import submitit

from pretrain.exit_codes import REFUSED, STOPPED
from slurm import records, requeue
from slurm.marks import Marks, named
from slurm.stages import Stage

SEEN_S = 60.0
"""Until what was written on one node is seen on another, on a network file system."""


class StageJob:
    """Part `part` of `stage`; of an array it shares the work by RANK and WORLD_SIZE.

    One that ends for its time, or is preempted, goes back into the queue: what the commands write is whole or not
    there, and what is there is not done again.
    """

    def __init__(self, stage: Stage, part: int, needs: Sequence[Stage], marks: Marks, max_restarts: int) -> None:
        self.stage, self.part, self.needs, self.marks = stage, part, list(needs), marks
        self.max_restarts = max_restarts
        self.folder = marks.folder.parent / "slurm"
        """Of its records."""
        self.how = ""

    def __call__(self) -> None:
        place = submitit.JobEnvironment()
        job, restart = place.job_id, requeue.restarts()
        if place.cluster == "slurm":
            requeue.listen(self._note, alone=True)
        else:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)
        records.append(self.folder, "began", job=job, restart=restart, nodes=list(place.hostnames), silent=[])
        self.how = "failed: exit code 1"
        try:
            self._do(job)
            self.how = "done"
        except SystemExit as end:
            if end.code != STOPPED:  # else it was asked to end, and told how
                self.how = f"failed: exit code {end.code}"
            raise
        finally:
            records.append(self.folder, "ended", job=job, restart=restart, how=self.how)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit where there is no Slurm: the same again."""
        return submitit.helpers.DelayedSubmission(self)

    def _do(self, job: str) -> None:
        import polyview

        on = self._on()
        os.environ.update(RANK=str(self.part), WORLD_SIZE=str(self.stage.parts))
        if code := polyview.main([named(word, on) for word in self.stage.argv]):
            sys.exit(code)
        self.marks.write(self.stage, self.part, on, job)

    def _note(self, how: str) -> None:
        self.how = how

    def _on(self) -> dict[str, str | None]:
        """The ends that this stands on, once they are seen from here."""
        patience = time.monotonic() + SEEN_S
        on = self.marks.stamps(self.needs)
        while missing := [name for name, stamp in on.items() if stamp is None]:
            if time.monotonic() > patience:
                print(f"{' and '.join(missing)}: no mark of an end in {self.marks.folder}", file=sys.stderr)
                sys.exit(REFUSED)
            time.sleep(1)
            on = self.marks.stamps(self.needs)
        return on
