"""Inline SVG: a training curve, and the dot-and-whisker strip that stands beside every metric."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise

from pretrain.markup import esc, number

WIDTH, HEIGHT = 340, 170
SMOOTHED_FROM = 60  # points: shorter curves are read as they are
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22
MOST_POINTS = 300  # a curve is drawn about 300 pixels wide: more points would only weigh


def curve(points: Sequence[tuple[float, float]], name: str) -> str:
    """One logged figure over steps; `points` are (step, value), finite, in order of step.

    Beyond 300 points each stretch keeps its least and its greatest value: a spike of one step stays visible.
    """
    smooth = thin(running_mean(points), MOST_POINTS) if len(points) >= SMOOTHED_FROM else []
    points = thin(points, MOST_POINTS)
    x_low, x_high = points[0][0], max(points[-1][0], points[0][0] + 1)
    ticks = scale([v for _, v in points])
    low, high = ticks[0], ticks[-1]

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return round(x, 1), round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    dots = [place(*p) for p in points]
    told = [[x, f"step {step:,.0f}: {number(value)}"] for (x, _), (step, value) in zip(dots, points)]
    lines = "".join(_tick(place(x_low, t)[1], t) for t in ticks)
    drawn = _path(dots, 0.35 if smooth else 1) + (_path([place(*p) for p in smooth], 1) if smooth else "")
    one = f'<circle cx="{dots[0][0]}" cy="{dots[0][1]}" r="3" fill="var(--own)"/>' if len(dots) == 1 else ""
    return (
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(name)} over steps"'
        f' data-width="{WIDTH}" data-points="{esc(json.dumps(told, separators=(",", ":")))}">{lines}'
        f"{drawn}{one}"
        f'<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--soft)" style="display:none"/>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">{number(x_low)}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">'
        f"step {number(points[-1][0])}</text></svg>"
    )


def _path(dots: Sequence[tuple[float, float]], opacity: float) -> str:
    line = "L".join(f"{x} {y}" for x, y in dots)
    return (
        f'<path d="M{line}" fill="none" stroke="var(--own)" stroke-width="{1.7 if opacity == 1 else 1.1}"'
        f' stroke-opacity="{opacity}" stroke-linejoin="round"/>'
    )


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each value replaced by the mean of its neighbourhood, a twentieth of the curve wide."""
    reach = max(1, len(points) // 40)
    total = [0.0]
    for _, value in points:
        total.append(total[-1] + value)
    made = []
    for i, (step, _) in enumerate(points):
        lo, hi = max(0, i - reach), min(len(points), i + reach + 1)
        made.append((step, (total[hi] - total[lo]) / (hi - lo)))
    return made


def _tick(y: float, value: float) -> str:
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="var(--grid)"/>'
        f'<text x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{number(value)}</text>'
    )


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points: the first, the last, and of each stretch between its least and its greatest."""
    if len(points) <= most:
        return list(points)
    stretches = (most - 2) // 2
    edges = [1 + round(i * (len(points) - 2) / stretches) for i in range(stretches + 1)]
    kept = [points[0]]
    for lo, hi in pairwise(edges):
        part = points[lo:hi]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])} if part else set()
        kept += sorted(ends)
    return [*kept, points[-1]]


def scale(values: Sequence[float], ticks: int = 4) -> list[float]:
    """Round numbers that span the values: about `ticks` steps of 1, 2, 2.5 or 5 times a power of ten."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


STRIP = 230


def strip(
    figures: Sequence[tuple[float | None, Sequence[float] | None, str]],
    chance: float | None,
    top: float,
    *,
    logarithmic: bool = False,
) -> str:
    """Each figure as a dot with its interval as a whisker, one below the other, chance as a dashed line.

    `figures`: (value, interval or None, colour). The axis runs from 0 to `top`, or from 1 to `top` by powers.
    """
    height = 8 + 13 * len(figures)

    def place(value: float) -> float:
        part = math.log(max(value, 1)) / math.log(max(top, 2)) if logarithmic else value / top
        return round(6 + min(max(part, 0), 1) * (STRIP - 12), 1)

    rows = [f'<line x1="6" x2="{STRIP - 6}" y1="{height - 1}" y2="{height - 1}" stroke="var(--line)"/>']
    if chance is not None:
        x = place(chance)
        rows.append(
            f'<line x1="{x}" x2="{x}" y1="0" y2="{height}" stroke="var(--soft)" stroke-dasharray="2 2.5">'
            "<title>chance</title></line>"
        )
    for i, (value, interval, colour) in enumerate(figures):
        rows.append(_dot(value, interval, colour, 9 + 13 * i, place))
    return f'<svg viewBox="0 0 {STRIP} {height}" aria-hidden="true">{"".join(rows)}</svg>'


def _dot(value, interval, colour: str, y: int, place) -> str:
    if value is None:
        return ""
    whisker = ""
    if interval is not None:
        lo, hi = map(place, interval)
        whisker = (
            f'<line x1="{lo}" x2="{max(hi, lo + 0.5)}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="3"'
            ' stroke-opacity=".4" stroke-linecap="round"/>'
        )
    return f'{whisker}<circle cx="{place(value)}" cy="{y}" r="4.2" fill="{colour}"/>'
