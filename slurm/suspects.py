"""Nodes that runs were lost on: told and proposed for exclusion, never taken out silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pretrain.telemetry.alive import SILENT, heartbeats
from slurm import records


def silent(run: Path, folder: Path) -> list[str]:
    """Nodes of the newest attempt in `folder` whose ranks all fell silent, without a last word, before others of
    RUN/heartbeat did; [] when all stopped together."""
    tried = records.attempts(folder)
    if not tried:
        return []
    signs = [s for s in heartbeats(run) if s["host"] in tried[-1].nodes and s["time"] >= tried[-1].began]
    newest = {host: max(s["time"] for s in signs if s["host"] == host) for host in {s["host"] for s in signs}}
    ended = {s["host"] for s in signs if s["phase"] == "end"}
    apart_s = SILENT * max((s["every_s"] for s in signs), default=0.0)
    return sorted(h for h, at in newest.items() if h not in ended and max(newest.values()) - at > apart_s)


def suspects(tried: Sequence[records.Attempt]) -> dict[str, int]:
    """Nodes that were lost, and how often; the most often lost first."""
    return dict(Counter(node for attempt in tried for node in attempt.silent).most_common())


def without(run: Path, lost: dict[str, int]) -> str | None:
    """The command that submits `run` again without the nodes that were lost."""
    return f"python -m slurm requeue {run} --exclude {','.join(lost)}" if lost else None
