"""Jobs are ended: at once, or when what they train is saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import UserError
from pretrain.telemetry.alive import alive, heartbeats
from pretrain.telemetry.progress import duration
from slurm import queue, saves, tail
from slurm.queue import Queued
from slurm.status import Jobs, Seen, is_run, look, runs_below

POLL_S = 1.0
TELL_S = 10.0
"""Between two words to the person who waits."""
LEAVE_S = 30.0
"""For a job that has saved to end by itself."""


@dataclass(frozen=True)
class Cancelled:
    """A job that was ended. As JSON it is what it says here."""

    job: str
    run: str | None
    """None: it trains nothing."""
    step: int | None = None
    """Where the run was."""
    saved: int | None = None
    """The step that it goes on from, when it is submitted again."""

    @property
    def lost(self) -> int:
        return max(0, (self.step or 0) - (self.saved or 0))


def run_of(job: Queued) -> Path | None:
    """The run that `job` trains; None: it does something else, or has not begun."""
    about = Path(job.about)
    return next((run for run in ([about] if is_run(about) else runs_below(about)) if queue.of_run(run, [job])), None)


def cancel(job: Queued) -> Cancelled:
    """End a job now."""
    run = run_of(job)
    _scancel(job.job)
    if run is None or job.waits:
        return Cancelled(job.job, str(run) if run else None)
    seen = look(run, Jobs([job]))
    return Cancelled(job.job, str(run), seen.tail.step, _saved(seen))


def save_and_cancel(jobs: Sequence[Queued], limit_s: float, tell: Callable[[str], None]) -> list[Cancelled]:
    """End jobs; those that train are told to save first, and have `limit_s` seconds for that. tell: given the progress.

    Raises:
        UserError: a run has not saved in that time; its job is left to run.
    """
    training = {job: run for job in jobs if not job.waits and (run := run_of(job)) is not None}
    waiters = {job: _Save(job, run) for job, run in training.items()}
    ended = [cancel(job) for job in jobs if job not in training]
    told, begun = time.monotonic(), time.monotonic()
    while waiting := _unsaved(waiters.values()):
        now = time.monotonic()
        if now - begun > limit_s:
            raise UserError("; ".join(waiter.unsaved(limit_s) for waiter in waiting))
        if now - told > TELL_S:
            told = now
            tell("; ".join(waiter.progress() for waiter in waiting) + f" ({duration(now - begun)})")
        time.sleep(POLL_S)
    return ended + [waiter.end() for waiter in waiters.values()]


def _unsaved(waiters: Iterable[_Save]) -> list[_Save]:
    there = _in_queue()
    return [waiter for waiter in waiters if not waiter.stopped() and (there is None or waiter.job.job in there)]


def running_here(run: str) -> str:
    """How to end a run that goes on without Slurm; "" where it does not."""
    signs = heartbeats(Path(run))
    if not signs or not alive(Path(run)):
        return ""
    return f"; it runs without Slurm: `kill {signs[0]['pid']}` on {signs[0]['host']} has it save and end"


class _Save:
    """A running job is told to save and end (SIGUSR1 to all its steps), and watched."""

    def __init__(self, job: Queued, run: Path) -> None:
        self.job, self._run = job, run
        self._log = run / "log.jsonl"
        self._read = self._log.stat().st_size if self._log.is_file() else 0
        queue.ask("scancel", "--signal=USR1", job.job)

    def stopped(self) -> bool:
        """Whether the run has told since that it saved and stopped, or came to its end."""
        if not self._log.is_file():
            return False
        with self._log.open("rb") as log:
            log.seek(self._read)
            return any(record.get("event") in ("stop", "end") for record in tail.records_in(log.read()))

    def progress(self) -> str:
        end = tail.read(self._run)
        return f"job {self.job.job}: waiting for the save, step {end.step or 0:,}"

    def unsaved(self, limit_s: float) -> str:
        end = tail.read(self._run)
        return (
            f"job {self.job.job} of {self._run} has not saved within {limit_s:.0f} s (step {end.step or 0:,}); it is "
            f"left as it is: see `python -m slurm status {self._run}`; wait longer with --limit-s, or cancel it "
            "without --save-first"
        )

    def end(self) -> Cancelled:
        """Let the job leave, or take it out of the queue."""
        patience = time.monotonic() + LEAVE_S
        while self.job.job in (_in_queue() or ()) and time.monotonic() < patience:
            time.sleep(POLL_S)
        _scancel(self.job.job)
        seen = look(self._run, Jobs([]))
        return Cancelled(self.job.job, str(self._run), seen.tail.step, _saved(seen))


def _saved(seen: Seen) -> int | None:
    return saves.step(seen.run, seen.starts, seen.tail)


def _in_queue() -> set[str] | None:
    """Jobs that have not come to their end; None: Slurm does not answer now."""
    try:
        return {job.job for job in queue.queued() if job.state != "COMPLETING"}
    except UserError:
        return None


def _scancel(job: str) -> None:
    """Take a job out of the queue; one that is gone already is well."""
    try:
        queue.ask("scancel", job)
    except UserError:
        if job in (_in_queue() or {job}):
            raise
