"""Whether somebody trains into a run's folder: told by the ranks' heartbeats, without them by the folder's lock."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

FOLDER = "heartbeat"
SILENT = 4
"""Times `faults.heartbeat_s` without a sign of life after which a rank counts as silent."""
LEAST_S = 60.0
"""Seconds that it may be silent at any rate, seen from elsewhere: a network file system shows signs that late."""


def alive(folder: Path) -> bool:
    """Whether the run in `folder` is going on now."""
    beats = heartbeats(folder)
    return any(map(_beating, beats)) if beats else _locked(folder / "LOCK")


def heartbeats(folder: Path) -> list[dict[str, Any]]:
    """The newest sign of life of every rank (RUN/heartbeat), by rank; what cannot be read is left out."""
    found = []
    for file in sorted((folder / FOLDER).glob("rank_*.json")):
        try:
            beat = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(beat, dict):
            found.append(beat)
    return found


def _beating(beat: dict[str, Any]) -> bool:
    silent_s = max(LEAST_S, SILENT * float(beat.get("every_s", 0)))
    if beat.get("phase") == "end" or time.time() - float(beat.get("time", 0)) > silent_s:
        return False
    return beat.get("host") != platform.node() or _is_process(beat.get("pid"))


def _is_process(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        pass
    return True


def _locked(file: Path) -> bool:
    try:
        with open(file) as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
