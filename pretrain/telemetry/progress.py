"""The line a person watches: where the run is, how fast, how long still, and what was saved.

On a terminal one line that is rewritten; in a file (Slurm's, nohup's) a plain line for the first logged step,
then at most one every ten seconds, and the last.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

QUIET_S = 10.0  # seconds between plain lines
TERMINAL_S = 0.1  # seconds between rewrites of the terminal's line
SMOOTHING = 0.1  # weight of the newest step time in the ETA's average


class Progress:
    """Shows the latest logged numbers of a run of `total_steps`; `stream` defaults to stderr."""

    def __init__(
        self, total_steps: int, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total_steps = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._clock = clock
        self._step_s: float | None = None
        self._seen: tuple[int, float] | None = None  # step and time of the update before
        self._shown_at: float | None = None
        self._saved: int | None = None
        self._pending: str | None = None

    def saved(self, step: int) -> None:
        """The checkpoint of `step` is whole."""
        self._saved = step

    def update(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Take the numbers of a logged step (its key `loss`, `images_per_s`, `data_wait` where present)."""
        now = self._clock()
        if self._seen is not None and step > self._seen[0]:
            newest = (now - self._seen[1]) / (step - self._seen[0])
            old = newest if self._step_s is None else self._step_s
            self._step_s = old + SMOOTHING * (newest - old)
        self._seen = (step, now)
        self._pending = self.line(step, numbers)
        pause = TERMINAL_S if self._terminal else QUIET_S
        if self._shown_at is None or now - self._shown_at >= pause or step >= self.total_steps:
            self._show(now)

    def line(self, step: int, numbers: Mapping[str, Any]) -> str:
        """The text for a step: missing numbers are left out, ones that are not finite stand as 'nan'."""
        parts = [f"step {step:,}/{self.total_steps:,}"]
        if "loss" in numbers:
            parts.append(f"loss {_number(numbers['loss'], '.4g')}")
        if "images_per_s" in numbers:
            parts.append(f"{_number(numbers['images_per_s'], ',.4g')} images/s")
        if "data_wait" in numbers:
            parts.append(f"data wait {_number(numbers['data_wait'], '.0%')}")
        if self._step_s is not None:
            parts.append(f"ETA {duration(self._step_s * max(0, self.total_steps - step))}")
        if self._saved is not None:
            parts.append(f"saved {self._saved:,}")
        return " · ".join(parts)

    def close(self) -> None:
        """Show what has not been shown yet, and leave the terminal on a fresh line."""
        if self._pending is not None:
            self._show(self._clock())
        if self._terminal and self._shown_at is not None:
            self._stream.write("\n")
            self._stream.flush()

    def _show(self, now: float) -> None:
        text, self._pending, self._shown_at = self._pending or "", None, now
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r{text[:width]}\x1b[K")
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """'45s', '3m20s', '5h07m', '2d04h'."""
    s = round(seconds)
    for unit, below, high, low in ((86400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s")):
        if s >= unit:
            return f"{s // unit}{high}{s % unit // below:02d}{low}"
    return f"{s}s"


def _number(value: Any, form: str) -> str:
    try:
        return format(float(value), form)
    except (TypeError, ValueError):
        return "nan"  # None: the run log's way to write what is not finite
