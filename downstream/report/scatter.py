"""The embedding map: every point an image, near points alike to the encoder, coloured by class or cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from downstream.report.markup import is_picture, short
from pretrain.markup import esc, isolated

SIDE_X, SIDE_Y, EDGE = 560, 440, 12
MOST_COLOURS = 20


def maps(shown: Sequence[tuple[str, Mapping[str, Any]]], anchor: str) -> str:
    """Maps side by side, (title, map) each, with one legend; a map has "points" [[x, y, class, picture], …]
    (coordinates in 0..1), "classes", "by" ("class" or "cluster") and "method".
    """
    drawn = "".join(_figure(title, data) for title, data in shown)
    by_class = next((data for _, data in shown if data.get("by") == "class"), None)
    legend = _legend(by_class, anchor) if by_class is not None else ""
    return f'<div class="maps" id="{anchor}">{drawn}</div>{legend}'


def _figure(title: str, data: Mapping[str, Any]) -> str:
    names = data.get("classes", [])
    points = data.get("points", [])
    circles = "".join(_circle(p, names) for p in points if _sound(p))
    told = f"{data.get('method', '')} of {len(points):,} images, coloured by {data.get('by', 'class')}"
    return (
        f'<figure style="margin:0"><h3>{isolated(title)}</h3>'
        f'<svg class="map" viewBox="0 0 {SIDE_X} {SIDE_Y}" role="img" aria-label="embedding map">'
        f"{circles}</svg>"
        f"<figcaption>{esc(told)}</figcaption></figure>"
    )


def _sound(point: Any) -> bool:
    return len(point) >= 3 and all(isinstance(v, int | float) for v in point[:3])


def _circle(point: Sequence[Any], names: Sequence[str]) -> str:
    kind = int(point[2])
    name = names[kind] if 0 <= kind < len(names) else ""
    x, y = EDGE + point[0] * (SIDE_X - 2 * EDGE), EDGE + point[1] * (SIDE_Y - 2 * EDGE)
    picture = f' data-src="{point[3]}"' if len(point) > 3 and is_picture(point[3]) else ""
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.4" style="--c:{colour(kind, len(names))}" data-c="{kind}"'
        f' data-name="{esc(short(name, 60))}"{picture}/>'
    )


def colour(kind: int, kinds: int) -> str:
    """A colour of its own for each of `kinds` classes, readable on light and dark; grey for none."""
    if kind < 0:
        return "#8b9099"
    steps = max(min(kinds, MOST_COLOURS), 1)
    hue = (210 + kind % steps * 360 / steps) % 360
    return f"hsl({hue:.0f} {72 - 18 * (kind % 2)}% {50 - 9 * (kind % 3 == 1) + 6 * (kind % 3 == 2)}%)"


def _legend(data: Mapping[str, Any], anchor: str) -> str:
    names = data.get("classes", [])
    keys = "".join(
        f'<span data-class="{i}"><i class="key" style="background:{colour(i, len(names))}"></i>'
        f"{isolated(short(n, 24))}</span>"
        for i, n in enumerate(names[:40])
    )
    more = f"<span>and {len(names) - 40:,} more (colours repeat)</span>" if len(names) > 40 else ""
    return f'<div class="legend" data-maps="{anchor}">{keys}{more}</div>'
