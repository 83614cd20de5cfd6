"""One run looked at closely: its ranks, its attempts, nodes that it was lost on, its newest checkpoint, its logs."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.telemetry.alive import LEAST_S, SILENT, heartbeats
from pretrain.telemetry.progress import duration
from slurm import queue, records, saves
from slurm.logfile import log_file
from slurm.status import Seen, how, unexplained
from slurm.suspects import suspects

STANDS_S = 60.0
"""Seconds at one place after which a rank counts as stuck."""
STEPS_LONG = 5.0
"""Or as many steps, where those take longer."""
MOST_RANKS = 16
"""Told one by one."""


@dataclass(frozen=True)
class Details:
    """As JSON it is what it says here."""

    ranks: list[str]
    """What is wrong with ranks of a run that goes on, a line each."""
    attempts: list[dict[str, Any]]
    suspects: dict[str, int]
    """Nodes whose ranks fell silent before the others', and in how many attempts."""
    checkpoint: str | None
    """The newest whole one."""
    logs: str | None
    """Of rank 0: the newest job's."""


def details(seen: Seen) -> Details:
    """What is told of one run; Slurm's accounting is asked about attempts that no record explains."""
    cut = sorted({attempt.job for attempt in seen.tried if unexplained(attempt)})
    accounts = queue.endings(cut)
    return Details(
        ranks=ranks(heartbeats(seen.run), _world(seen), seen.tail.step_s or 0.0) if seen.goes_on else [],
        attempts=[_attempt(seen, attempt, accounts) for attempt in seen.tried],
        suspects=suspects(seen.tried),
        checkpoint=newest_checkpoint(seen),
        logs=_logs(seen),
    )


def ranks(signs: Sequence[dict[str, Any]], world: int, step_s: float, now: float | None = None) -> list[str]:
    """Ranks that are silent, missing, or stand still away from the others; [] when all is well.

    Ranks wait for each other: where most stand at one place, what they wait for is elsewhere. step_s: seconds a step.
    """
    now = time.time() if now is None else now
    living = [s for s in signs if s["phase"] != "end"]
    silent = [s for s in living if now - s["time"] > max(LEAST_S, SILENT * s["every_s"])]
    lines = [
        f"rank {s['rank']} on {s['host']} gave no sign of life for {duration(now - s['time'])} "
        f"(it was in {s['phase']} at step {s['step']:,})"
        for s in silent
    ]
    lines += _standing([s for s in living if s not in silent], max(STANDS_S, STEPS_LONG * step_s))
    if missing := sorted(set(range(world)) - {s["rank"] for s in signs}):
        lines.append(f"no sign of life yet of {'ranks' if len(missing) > 1 else 'rank'} {_ranges(missing)}")
    return [*lines[:MOST_RANKS], f"and {len(lines) - MOST_RANKS} more"] if len(lines) > MOST_RANKS else lines


def _standing(signs: list[dict[str, Any]], long_s: float) -> list[str]:
    """Those that are elsewhere than most of those that stand still, then those."""
    stuck = [s for s in signs if s["since"] > long_s]
    if not stuck:
        return []
    ((step, phase), many), *_ = Counter((s["step"], s["phase"]) for s in stuck).most_common(1)
    crowd = [s for s in stuck if (s["step"], s["phase"]) == (step, phase)]
    away = [s for s in signs if (s["step"], s["phase"]) != (step, phase) and (many > 1 or s in stuck)]
    lines = [_stands(s) for s in away]
    if many == 1:
        return [*lines, _stands(crowd[0])]
    since = duration(min(s["since"] for s in crowd))
    who = f"{many} others wait" if away else f"{many} ranks stand"
    return [*lines, f"{who} in {phase} at step {step:,} for {since}"]


def newest_checkpoint(seen: Seen) -> str | None:
    """Where the newest whole checkpoint is; of places that cannot be listed from here what the log tells."""
    if (folder := saves.newest(seen.run, seen.starts)) is not None:
        return str(folder)
    if seen.tail.saved is None:
        return None
    elsewhere = [str(start["to"]) for start in seen.starts if start.get("to")]
    return f"step {seen.tail.saved:,} in {elsewhere[-1]}, by the log" if elsewhere else None


def _stands(sign: dict[str, Any]) -> str:
    place = f"{sign['phase']} at step {sign['step']:,}"
    return f"rank {sign['rank']} on {sign['host']} stands in {place} for {duration(sign['since'])}"


def _attempt(seen: Seen, attempt: records.Attempt, accounts: dict[str, list[str]]) -> dict[str, Any]:
    runs = attempt is seen.tried[-1] and attempt.how is None and seen.goes_on
    return {
        "job": attempt.job, "restart": attempt.restart, "nodes": attempt.nodes, "began": attempt.began,
        "ended": attempt.ended, "how": "runs" if runs else how(attempt, accounts), "silent": attempt.silent,
    }  # fmt: skip


def _logs(seen: Seen) -> str | None:
    job = seen.job.job if seen.job else str(seen.submitted["job"]) if seen.submitted else None
    return str(log_file(seen.logs, job)) if job else None


def _world(seen: Seen) -> int:
    return int(seen.starts[-1].get("world") or 0) if seen.starts else 0


def _ranges(numbers: Sequence[int]) -> str:
    """'3', '0-7, 12'."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    text = ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups)
    return re.sub(r"^(.{200}[^,]*).*$", r"\1, …", text)
