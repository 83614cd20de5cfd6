"""Where a step's time goes: every moment between two lines of the log belongs to one phase.

On CUDA a mark is an event in the stream, read when the line is written: the device is never waited for in between,
and "data" is the time that it stood without a batch. Elsewhere clocks are read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

KEPT_EVENTS = 4096
"""Marks not read yet, from which on those that the device has passed are summed up early."""


class Phases:
    """Seconds by phase: "data", "transfer", "forward", "loss", "backward", "step", "log", "save", "evaluate"."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device is not None and device.type == "cuda"
        self._spent: dict[str, float] = {}
        self._now: str | None = None
        self._since = 0.0
        self._marks: list[tuple[str | None, torch.cuda.Event]] = []
        self._spare: list[torch.cuda.Event] = []

    def mark(self, phase: str | None) -> None:
        """From here on it is `phase`; None: nothing that is counted."""
        if self._cuda:
            self._record(phase)
        else:
            now = time.perf_counter()
            if self._now is not None:
                self._spent[self._now] = self._spent.get(self._now, 0.0) + now - self._since
            self._since = now
        self._now = phase

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """`phase` inside, and what it was before from there on."""
        before = self._now
        self.mark(phase)
        try:
            yield
        finally:
            self.mark(before)

    def read(self, steps: int = 1) -> dict[str, float]:
        """Mean seconds a step since the last call, which was `steps` before, as "time/data_s" and so on."""
        self.mark(self._now)
        if self._cuda:
            self._marks[-1][1].synchronize()
            self._sum_up()
        spent, self._spent = self._spent, {}
        return {f"time/{phase}_s": seconds / steps for phase, seconds in spent.items()}

    def _record(self, phase: str | None) -> None:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((phase, event))
        if len(self._marks) >= KEPT_EVENTS:
            self._sum_up()

    def _sum_up(self) -> None:
        """Add up the time between marks that the device has passed, and keep the others."""
        passed = next((i for i, (_, event) in enumerate(self._marks) if not event.query()), len(self._marks)) - 1
        for (phase, event), (_, following) in zip(self._marks[:passed], self._marks[1:]):
            if phase is not None:
                self._spent[phase] = self._spent.get(phase, 0.0) + event.elapsed_time(following) / 1000
            self._spare.append(event)
        del self._marks[: max(0, passed)]
