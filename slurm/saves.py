"""What a run has saved, told from its folder and its log, without reading a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slurm import tail

_STEP = re.compile(r"step_(\d+)")


def newest(run: Path, starts: Sequence[dict[str, Any]]) -> Path | None:
    """The folder of the newest whole checkpoint in the folders that the run has saved to; starts: RUN/run.json."""
    places = [run / "checkpoints", *(Path(s["to"]) for s in starts if "://" not in (s.get("to") or "://"))]
    whole = [file.parent for place in dict.fromkeys(places) for file in place.glob("step_*/manifest.json")]
    return max(whole, key=step_of, default=None)


def step(run: Path, starts: Sequence[dict[str, Any]], end: tail.Tail) -> int | None:
    """The step of the newest save; of places that cannot be listed from here what the end of the log tells."""
    folder = newest(run, starts)
    told = [s for s in (end.saved, step_of(folder) if folder else None) if s is not None]
    return max(told, default=None)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named by; -1: by none."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else -1
