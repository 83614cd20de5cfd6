"""What happened to the jobs of a folder: FOLDER/jobs.jsonl, a line a submission, a start and an end.

{"event": "submitted", "job", "time", "name", "cluster", "nodes", "most_nodes", "ranks_per_node", "after", "code", …}
    of a run its "recipe", "profile", and "cwd", which its paths start from; "logs" where they are not in FOLDER; of a
    pipeline's stage "argv" and "elements"
{"event": "began", "job", "restart", "time", "nodes": […], "silent": […]}   silent: lost in the attempt before
{"event": "ended", "job", "restart", "time", "how": "done" | "stopped" | "requeued…" | "failed: …"}

A "began" without its "ended", and with another behind it, was cut off: killed, or its node lost.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "jobs.jsonl"


@dataclass
class Attempt:
    """One start of a job by Slurm."""

    job: str
    restart: int
    began: float
    nodes: list[str]
    ended: float | None = None
    how: str | None = None
    """None: it runs, or was cut off."""
    silent: list[str] = field(default_factory=list)
    """Its nodes whose ranks fell silent before the others', when it was cut off."""


def append(folder: Path, event: str, **fields: Any) -> None:
    """Add a line; whole, also beside other writers."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"event": event, "time": time.time(), **fields}) + "\n"
    fd = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


def read(folder: Path) -> list[dict[str, Any]]:
    """All lines, the oldest first; half-written ones are passed over."""
    return list(_lines(folder / FILE))


def submissions(folder: Path) -> list[dict[str, Any]]:
    """What was submitted, the oldest first."""
    return [line for line in read(folder) if line["event"] == "submitted"]


def attempts(folder: Path) -> list[Attempt]:
    """Every start, the oldest first."""
    found: dict[tuple[str, int], Attempt] = {}
    for line in read(folder):
        key = str(line.get("job")), int(line.get("restart") or 0)
        if line["event"] == "began":
            found[key] = Attempt(line["job"], line["restart"], line["time"], line["nodes"])
            if line["silent"] and len(found) > 1:
                list(found.values())[-2].silent = line["silent"]
        elif line["event"] == "ended" and key in found:
            found[key].ended, found[key].how = line["time"], line["how"]
    return list(found.values())


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        text = file.read_text()
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
