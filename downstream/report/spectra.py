"""Spectra of features as one chart for each part of the model: a line for each run, by powers of ten."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from downstream.report.charts import MOST_POINTS
from pretrain.markup import esc, isolated

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 24
LOWEST = -8  # powers of ten below the largest value that are drawn
PARTS = {"encoder": "Encoder", "projector": "Projector"}


def charts(shown: Sequence[tuple[str, str, Mapping[str, Any]]]) -> str:
    """`shown`: (name, colour, {"encoder": [shares of the largest value, falling], "projector": […]}), one a run."""
    drawn = [_chart(part, title, lines) for part, title in PARTS.items() if (lines := _lines(shown, part))]
    keys = "".join(
        f'<span><i class="key" style="background:{colour}"></i>{isolated(name)}</span>' for name, colour, _ in shown
    )
    return f'<div class="maps">{"".join(drawn)}</div><div class="legend">{keys}</div>' if drawn else ""


def _lines(shown, part: str) -> list[tuple[str, str, list[float]]]:
    each = ((name, colour, values.get(part)) for name, colour, values in shown)
    return [(n, c, [float(v) for v in values]) for n, c, values in each if isinstance(values, list) and values]


def _chart(part: str, title: str, lines: Sequence[tuple[str, str, list[float]]]) -> str:
    widest = max(len(values) for _, _, values in lines)
    grid = "".join(_grid_line(power) for power in range(0, LOWEST - 1, -2))
    paths = "".join(_path(values, widest, colour, name) for name, colour, values in lines)
    return (
        f'<figure style="margin:0"><h3>{esc(title)}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="spectrum of the {esc(part)}" style="width:100%;height:auto">{grid}{paths}'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">1</text><text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">'
        f"direction {widest:,}</text></svg></figure>"
    )


def _height(power: float) -> float:
    return round(TOP + max(power, LOWEST) / LOWEST * (HEIGHT - TOP - BOTTOM), 1)


def _grid_line(power: int) -> str:
    y = _height(power)
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="var(--grid)"/>'
        f'<text x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{"1" if power == 0 else f"1e{power}"}</text>'
    )


def _path(values: Sequence[float], widest: int, colour: str, name: str) -> str:
    """A falling line needs no peaks kept: every n-th value, and the last."""
    step = max(1, len(values) // MOST_POINTS)
    places = [*range(0, len(values) - 1, step), len(values) - 1]
    points = [
        (round(LEFT + i / max(widest - 1, 1) * (WIDTH - LEFT - RIGHT), 1), _height(_power(values[i]))) for i in places
    ]
    line = "L".join(f"{x} {y}" for x, y in points)
    return (
        f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-linejoin="round">'
        f"<title>{esc(name)}</title></path>"
    )


def _power(value: float) -> float:
    return math.log10(value) if value > 0 and math.isfinite(value) else LOWEST
