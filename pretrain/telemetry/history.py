"""A run's log as curves of bounded size, read as it grows: a million lines or ten, the page costs the same.

A curve keeps the least and the greatest value of equal stretches, so a spike of one step stays visible.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

MOST_STRETCHES = 1000
"""Of a curve, each with up to two points; from there on stretches are joined two by two."""
MOST_EVENTS = 200
"""Events kept of each kind, the newest."""
NOT_DRAWN = {"step", "time", "samples_seen", "epoch"}

Point = tuple[float, float]


class Curve:
    """One logged number over steps, which only grow."""

    def __init__(self) -> None:
        self._width = 1  # values of a whole stretch
        self._stretches: list[tuple[int, Point, Point]] = []  # values, least, greatest
        self.last: Point | None = None

    def add(self, step: float, value: float) -> None:
        self.last = point = (step, value)
        if self._stretches:
            count, least, greatest = self._stretches[-1]
            if count < self._width:
                low, high = point if value < least[1] else least, point if value > greatest[1] else greatest
                self._stretches[-1] = (count + 1, low, high)
                return
        if len(self._stretches) == MOST_STRETCHES:
            self._halve()
        self._stretches.append((1, point, point))

    def cut(self, after: float) -> None:
        """Forget what comes after a step."""
        while self._stretches:
            count, *points = self._stretches[-1]
            kept = [p for p in points if p[0] <= after]
            if len(kept) == 2:
                break
            if kept:
                self._stretches[-1] = (count, kept[0], kept[0])
                break
            self._stretches.pop()
        if self.last and self.last[0] > after:
            self.last = max(self._stretches[-1][1:]) if self._stretches else None

    def points(self) -> list[Point]:
        """(step, value), in order; the newest among them."""
        found = [p for _, least, greatest in self._stretches for p in sorted({least, greatest})]
        return found if self.last is None or (found and found[-1] == self.last) else [*found, self.last]

    def _halve(self) -> None:
        self._width *= 2
        pairs = zip(self._stretches[::2], self._stretches[1::2])
        self._stretches = [(n + m, min(a, c, key=_value), max(b, d, key=_value)) for (n, a, b), (m, c, d) in pairs]


class History:
    """What the log of a run says so far."""

    def __init__(self, file: Path) -> None:
        self._file, self._read = file, 0
        self.curves: dict[str, Curve] = {}
        self.events: list[dict[str, Any]] = []
        """The newest of each kind, in order."""
        self.counts: Counter[str] = Counter()
        self.line: dict[str, Any] = {}
        """The newest step's."""
        self.total_steps: int | None = None

    def update(self) -> None:
        """Read what was written since the last call; a half-written line waits for its end."""
        if not self._file.is_file():
            return
        with self._file.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not isinstance(record, dict):
            return
        if "event" in record:
            self._event(record)
        elif isinstance(step := record.get("step"), int):
            if step <= self.line.get("step", -1):
                self._cut(step - 1)
            self.line = record
            for name, value in record.items():
                if type(value) in (int, float) and name not in NOT_DRAWN and math.isfinite(value):
                    if name not in self.curves:
                        self.curves[name] = Curve()
                    self.curves[name].add(step, value)

    def _event(self, record: dict[str, Any]) -> None:
        kind = str(record["event"])
        if kind in ("start", "resume"):  # steps that this start overtakes are no part of the run
            self._cut(record.get("step") or 0 if kind == "resume" else -1)
            self.total_steps = record.get("total_steps")
        self.counts[kind] += 1
        self.events.append(record)
        if len(self.events) > 2 * MOST_EVENTS and self.counts[kind] > MOST_EVENTS:
            oldest = next(i for i, e in enumerate(self.events) if str(e["event"]) == kind)
            del self.events[oldest]

    def _cut(self, after: int) -> None:
        for curve in self.curves.values():
            curve.cut(after)
        self.curves = {name: curve for name, curve in self.curves.items() if curve.last is not None}
        if self.line.get("step", -1) > after:
            self.line = {}


def _value(point: Point) -> float:
    return point[1]
