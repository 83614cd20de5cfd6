"""Jobs on this machine, so many at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit

from slurm.wait import outcome
from slurm.work import Work

POLL_S = 0.1
TAIL = 12
"""Lines of a log that are shown when its job failed."""

Start = Callable[[Work], "submitit.Job[Any]"]


def run_here(works: Sequence[Work], start: Start, parallel: int) -> Iterator[tuple[Work, submitit.Job[Any], int]]:
    """Each job as it ends, with its exit code; `parallel` run at once. When this is left early, they are told to end,
    and waited for: training saves."""
    waiting = list(works)[::-1]
    running: list[tuple[Work, submitit.Job[Any]]] = []
    try:
        while waiting or running:
            while waiting and len(running) < max(1, parallel):
                work = waiting.pop()
                with _deaf():
                    running.append((work, start(work)))
            for entry in [(work, job) for work, job in running if job.done()]:
                running.remove(entry)
                yield *entry, outcome(*entry, "local")
            time.sleep(POLL_S)
    finally:
        for _, job in running:
            job._process.send_signal(signal.SIGTERM)  # type: ignore[attr-defined]
        for _, job in running:
            job._process.wait()  # type: ignore[attr-defined]


@contextmanager
def _deaf() -> Iterator[None]:
    """What is started within does not take Ctrl-C: submitit's controllers would kill what is about to save."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def tail(log: Path) -> str:
    """The last lines of a log."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(f"  {line}" for line in lines[-TAIL:])
