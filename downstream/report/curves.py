"""The run's own log as small charts: one for each figure it wrote, losses first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from downstream.report.charts import curve
from pretrain.markup import esc, isolated, number
from pretrain.telemetry.figures import about, place

SKIPPED = {
    "step",
    "time",
    "epoch",
    "samples_seen",
    "eta_s",
    "elapsed_s",
    "timestamp",
    "wall_s",
    "attempt",
    "rank",
}


def section(lines: Iterable[Mapping[str, Any]]) -> str:
    """All curves of a run log, as HTML; `lines` are its entries in order of step."""
    drawn = [_card(key, points) for key, points in sorted(series(lines).items(), key=lambda kv: place(kv[0]))]
    if not drawn:
        return '<p class="card empty">The run has logged no steps yet.</p>'
    return f'<div class="grid">{"".join(drawn)}</div>'


def series(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Every logged number by name: {"loss": [(step, value), …]}; nested entries as "loss.clip".

    What is not finite is left out. Of entries of one step (written again after a resume) the last holds.
    """
    found: dict[str, dict[float, float]] = {}
    for line in lines:
        step = line.get("step")
        if not isinstance(step, int | float):
            continue
        for key, value in _numbers(line):
            if key not in SKIPPED and math.isfinite(value):
                found.setdefault(key, {})[float(step)] = float(value)
    return {key: sorted(points.items()) for key, points in found.items()}


def _numbers(entry: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for key, value in entry.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def _card(key: str, points: Sequence[tuple[float, float]]) -> str:
    title, line = about(key)
    return (
        f'<section class="card"><h3>{isolated(title)}<span class="now">{number(points[-1][1])}</span></h3>'
        f'<p class="soft">{esc(line)}</p>{curve(points, title)}</section>'
    )
