"""The end of a run's log: how far it is, how fast, and what happened last, without reading the log as a whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES = 24 << 10
"""Read from the end: some dozens of lines."""
RECENT = 20
"""Logged steps that the time of a step is taken over."""
_STEPS = re.compile(rb"^steps: (\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Tail:
    """What the end of RUN/log.jsonl says; None: nothing of that."""

    step: int | None = None
    total: int | None = None
    loss: float | None = None
    images_per_s: float | None = None
    step_s: float | None = None
    """Of the last logged steps, with all that lay between them."""
    time: float | None = None
    """Of the last logged step."""
    saved: int | None = None
    """The step of the newest save that is told of."""
    event: str | None = None
    """Of the last line, when that is none of a step: "stop", "end", "save", …"""

    @property
    def eta_s(self) -> float | None:
        if self.step is None or self.total is None or self.step_s is None:
            return None
        return max(0, self.total - self.step) * self.step_s


def read(run: Path) -> Tail:
    """The end of the log of `run`; of a run without one all is None but the steps that its recipe asks for."""
    log = run / "log.jsonl"
    lines = list(records_in(_last_bytes(log)))
    steps = _since_start(lines)
    last = steps[-1] if steps else {}
    events = [line for line in lines if "event" in line]
    begun = [event for event in events if event["event"] in ("start", "resume")]
    if not last and begun:
        last = {"step": begun[-1].get("step")}
    saves = [event["step"] for event in events if event["event"] in ("save", "resume") and event.get("step")]
    return Tail(
        step=_whole(last.get("step")),
        total=_whole(begun[-1].get("total_steps")) if begun else _asked(run),
        loss=_number(last.get("loss")),
        images_per_s=_number(last.get("images_per_s")),
        step_s=_pace(steps),
        time=_number(last.get("time")),
        saved=_whole(saves[-1]) if saves else None,
        event=str(lines[-1]["event"]) if lines and "event" in lines[-1] else None,
    )


def _last_bytes(file: Path, size: int = BYTES) -> bytes:
    """Whole lines at the end of `file`; b"" where there is none."""
    try:
        with file.open("rb") as handle:
            length = handle.seek(0, os.SEEK_END)
            handle.seek(max(0, length - size))
            data = handle.read()
    except OSError:
        return b""
    return data if length <= size else data.partition(b"\n")[2]


def records_in(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def _since_start(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of steps since the run was last begun or taken up; of all, where that logged none yet."""
    since: list[dict[str, Any]] = []
    for line in lines:
        if line.get("event") in ("start", "resume"):
            since = []
        elif "event" not in line and isinstance(line.get("step"), int):
            since.append(line)
    return since


def _pace(steps: list[dict[str, Any]]) -> float | None:
    recent = steps[-RECENT - 1 :]
    if len(recent) > 1 and recent[-1]["step"] > recent[0]["step"]:
        return (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
    return _number(recent[-1].get("step_s")) if recent else None


def _asked(run: Path) -> int | None:
    """Steps in all, by the resolved recipe; of one that counts epochs, by the log's first line."""
    with suppress(OSError):
        if found := _STEPS.search((run / "recipe.yaml").read_bytes()):
            return int(found[1])
        with (run / "log.jsonl").open("rb") as log:
            first = next(records_in(log.readline()), {})
        return _whole(first.get("total_steps"))
    return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
