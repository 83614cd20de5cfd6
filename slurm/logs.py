"""The log of one rank of a run, followed over requeues and over new jobs of the same run.

A job that comes back appends to its files; a line that `heading` makes begins each attempt in them.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.telemetry.alive import alive
from slurm import queue, records
from slurm.logfile import log_file
from slurm.reasons import why

POLL_S = 0.5
ASK_S = 10.0
"""Between two questions to Slurm."""
SILENT_S = 60.0
"""Without a job and without a sign of life: what is followed is over."""
_BLOCK = 1 << 16
_HEADING = re.compile(rb"^--- job (\S+), restart (\d+): ", re.MULTILINE)


@dataclass(frozen=True)
class Choice:
    """Which log of the run in `run`. attempt: of the table of `status`, the first is 1; None: the newest job's."""

    run: Path
    rank: int = 0
    stream: str = "err"
    attempt: int | None = None

    def job(self) -> str:
        """The job whose log it is.

        Raises:
            UserError: the run has no such job.
        """
        if self.attempt is not None:
            return self._attempt().job
        if sent := self._submissions():
            return str(sent[-1]["job"])
        raise UserError(
            f"{self.run}: no job of it was ever submitted; what it said is where it was started. Its figures are in "
            f"{self.run / 'log.jsonl'}, see `polyview page {self.run}`"
        )

    def file(self) -> Path:
        job = self.job()
        elsewhere = (line.get("logs") for line in self._submissions() if str(line["job"]) == job)
        return log_file(Path(next(elsewhere, None) or self.run / "slurm"), job, self.rank, self.stream)

    def text(self, lines: int) -> bytes:
        """The last `lines` lines.

        Raises:
            UserError: there is no such log.
        """
        file = self.file()
        if not file.is_file():
            raise UserError(self.missing(file))
        if self.attempt is None:
            return last_lines(file, lines)
        text = _of_attempt(file.read_bytes(), self._attempt().restart)
        return b"".join(text.splitlines(keepends=True)[-lines:]) if lines else b""

    def missing(self, file: Path) -> str:
        """Why there is no such log, in words."""
        job = file.name.partition("_")[0]
        if (waits := waiting(job)) is not None:
            return f"job {job} has not begun: {waits}"
        others = sorted(int(f.name.split("_")[-2]) for f in file.parent.glob(f"{job}_*_log.{self.stream}"))
        if others:
            return f"{file} is not there: job {job} has logs of ranks {others[0]} to {others[-1]}"
        if any(str(line["job"]) == job and line.get("cluster") == "local" for line in self._submissions()):
            return f"{file} is not there yet"
        return f"{file} is not there, and job {job} is not in the queue: it never began"

    def ended(self, job: str) -> bool:
        """Whether the last attempt of `job` is over, and no other will come."""
        ends = [attempt.how for attempt in records.attempts(self.run / "slurm") if attempt.job == job]
        return bool(ends) and ends[-1] is not None and not ends[-1].startswith("requeued")

    def _submissions(self) -> list[dict[str, Any]]:
        return records.submissions(self.run / "slurm")

    def _attempt(self) -> records.Attempt:
        tried = records.attempts(self.run / "slurm")
        assert self.attempt is not None
        if not 1 <= self.attempt <= len(tried):
            raise UserError(f"--attempt {self.attempt}: {self.run} had {len(tried)}, see `python -m slurm status`")
        return tried[self.attempt - 1]


def waiting(job: str) -> str | None:
    """Why `job` waits, in words; None when it does not, or Slurm does not tell."""
    return next((why(queued) for queued in _queued(job) or [] if queued.waits), None)


def last_lines(file: Path, lines: int, size: int | None = None) -> bytes:
    """The last `lines` lines of the first `size` bytes of a file of any size (None: of all of it)."""
    with file.open("rb") as handle:
        at = handle.seek(0, os.SEEK_END) if size is None else size
        text = b""
        while at > 0 and text.count(b"\n") <= lines:
            step = min(_BLOCK, at)
            at -= step
            handle.seek(at)
            text = handle.read(step) + text
    return b"".join(text.splitlines(keepends=True)[-lines:]) if lines else b""


def follow(choice: Choice, lines: int, tell: Callable[[str], None]) -> Iterator[bytes]:
    """The end of the log and what is added to it, over every job of the run, until no more will come.

    tell: given what happens beside, in words.
    """
    follower = _Follower(choice, tell)
    yield follower.begin(lines)
    while True:
        over = follower.over()  # before the log is read: what was written last is seen
        yield from follower.added()
        if over:
            return
        time.sleep(POLL_S)


class _Follower:
    """A place in the log of the newest job."""

    def __init__(self, choice: Choice, tell: Callable[[str], None]) -> None:
        self._choice, self._tell, self._told = choice, tell, ""
        self._file, self._at = choice.file(), 0
        self._asked = self._lived = time.monotonic()

    def begin(self, lines: int) -> bytes:
        if not self._file.is_file():
            self._say(self._choice.missing(self._file))
            return b""
        self._at = self._file.stat().st_size
        return last_lines(self._file, lines, self._at)

    def added(self) -> Iterator[bytes]:
        """What is new; where a newer job has begun a log of its own, it goes on there."""
        yield from self._more()
        newest = self._choice.file()
        if newest != self._file and newest.is_file():
            self._tell(f"==> {newest} <==")
            self._file, self._at = newest, 0
            yield from self._more()

    def over(self) -> bool:
        """Whether nothing more will come: the newest job ended, or there was no sign of it for a while."""
        now = time.monotonic()
        if now - self._asked < ASK_S:
            return False
        self._asked = now
        job = self._choice.job()
        jobs = _queued(job)
        for queued in jobs or []:
            if queued.waits:
                self._say(f"job {queued.job} waits: {why(queued)}")
        if not jobs and self._choice.ended(job):
            return True
        if jobs is None or jobs or alive(self._choice.run):
            self._lived = now
        return now - self._lived > SILENT_S

    def _more(self) -> Iterator[bytes]:
        try:
            with self._file.open("rb") as handle:
                if handle.seek(0, os.SEEK_END) < self._at:
                    self._at = 0  # it was written anew
                handle.seek(self._at)
                while block := handle.read(_BLOCK):
                    self._at += len(block)
                    yield block
        except FileNotFoundError:
            return

    def _say(self, what: str) -> None:
        if what != self._told:
            self._tell(what)
            self._told = what


def _of_attempt(text: bytes, restart: int) -> bytes:
    """The lines from the heading of an attempt to that of the next; all of them where there are no headings."""
    begins = [(m.start(), int(m[2])) for m in _HEADING.finditer(text)]
    for place, (start, number) in enumerate(begins):
        if number == restart:
            return text[start : begins[place + 1][0] if place + 1 < len(begins) else len(text)]
    return text


def _queued(job: str) -> list[queue.Queued] | None:
    """`job` in the queue, an array by its elements; None: Slurm does not answer."""
    if not queue.here():
        return []
    try:
        return queue.belonging(job, queue.queued())
    except UserError:
        return None
