"""Nodes that runs were lost on: told and proposed for exclusion, never taken out silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.exit_codes import LOST
from pretrain.telemetry.alive import SILENT, heartbeats
from slurm import records


def silent(run: Path, folder: Path) -> list[str]:
    """Nodes of the newest attempt in `folder`, as Slurm calls them, whose ranks all fell silent before others of
    RUN/heartbeat did; [] when that attempt ended by itself, or all stopped together."""
    tried = records.attempts(folder)
    if not tried or tried[-1].how not in (None, f"failed: exit code {LOST}"):
        return []
    called = {_short(node): node for node in tried[-1].nodes}  # a host may call itself n17.site.org
    nodes: dict[str, list[dict[str, Any]]] = {}
    for sign in heartbeats(run):
        if (node := called.get(_short(sign["host"]))) and sign["time"] >= tried[-1].began:
            nodes.setdefault(node, []).append(sign)
    took_leave = {host for host, signs in nodes.items() if any(sign["phase"] == "end" for sign in signs)}
    if took_leave:  # those that lost another rank say so; a node that is lost says nothing
        return sorted(nodes.keys() - took_leave)
    newest = {host: max(sign["time"] for sign in signs) for host, signs in nodes.items()}
    apart_s = SILENT * max((sign["every_s"] for signs in nodes.values() for sign in signs), default=0.0)
    return sorted(host for host, at in newest.items() if max(newest.values()) - at > apart_s)


def _short(host: str) -> str:
    return host.partition(".")[0]


def suspects(tried: Sequence[records.Attempt]) -> dict[str, int]:
    """Nodes that were lost, and how often; the most often lost first."""
    return dict(Counter(node for attempt in tried for node in attempt.silent).most_common())


def without(run: Path, lost: dict[str, int]) -> str | None:
    """The command that submits `run` again without the nodes that were lost."""
    return f"python -m slurm requeue {run} --exclude {','.join(lost)}" if lost else None
