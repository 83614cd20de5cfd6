"""Which classes are taken for which: a matrix up to 40 classes, else the pairs most often mistaken."""

from __future__ import annotations

from collections.abc import Sequence

from downstream.report.markup import share, short
from pretrain.markup import esc, isolated

MOST_CLASSES = 40
NUMBERS_UP_TO = 14


def matrix(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Counts[right class][predicted class] as an SVG; shade = share of the row, hover tells the count."""
    n = len(counts)
    cell = 34 if n <= NUMBERS_UP_TO else max(14, 520 // n)
    left, top = 96, 84
    parts = []
    for i, row in enumerate(counts):
        total = sum(row)
        parts.append(_label(left - 8, top + i * cell + cell / 2 + 4, names[i], "end"))
        parts.append(_label(left + i * cell + cell / 2, top - 8, names[i], "start", turned=True))
        parts += [_cell(left + j * cell, top + i * cell, cell, count, total, i == j, names[i], names[j], n)
                  for j, count in enumerate(row)]  # fmt: skip
    side_x, side_y = left + n * cell + 50, top + n * cell + 6
    return (
        f'<svg viewBox="0 0 {side_x} {side_y}" style="max-width:{side_x}px" role="img"'
        ' aria-label="confusion matrix">'
        f'{"".join(parts)}<text x="2" y="14">right ↓ / predicted →</text></svg>'
    )


def _label(x: float, y: float, name: str, anchor: str, turned: bool = False) -> str:
    turn = f' transform="rotate(-45 {x} {y})"' if turned else ""
    title = f"<title>{esc(name)}</title>"
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{turn}>{esc(short(name, 14))}{title}</text>'


def _cell(x, y, size, count, total, diagonal, right, predicted, n) -> str:
    part = count / total if total else 0.0
    colour = "var(--own)" if diagonal else "var(--wrong)"
    told = f"{right} → {predicted}: {count} of {total} ({share(part)})"
    number = ""
    if n <= NUMBERS_UP_TO and count:
        ink = "#fff" if part > 0.55 and diagonal else "var(--ink)"
        number = (
            f'<text x="{x + size / 2}" y="{y + size / 2 + 4}" text-anchor="middle"'
            f' style="pointer-events:none;fill:{ink}">{count}</text>'
        )
    box = f'<rect x="{x}" y="{y}" width="{size - 1}" height="{size - 1}" rx="2"'
    return (
        f'{box} fill="var(--grid)"/>{box} fill="{colour}" fill-opacity="{part:.3f}">'
        f"<title>{esc(told)}</title></rect>{number}"
    )


def mistakes(pairs: Sequence[Sequence], most: int = 10) -> str:
    """The pairs most often mistaken; `pairs` are [right class, predicted class, count, images of the right
    class].
    """
    rows = "".join(
        f"<tr><td style='text-align:left'>{isolated(short(right, 40))}</td>"
        f"<td style='text-align:left'>{isolated(short(predicted, 40))}</td>"
        f"<td>{count:,}</td><td>{share(count / total)}</td></tr>"
        for right, predicted, count, total in pairs[:most]
    )
    return (
        '<div class="wide"><table><thead><tr><th style="text-align:left">right class</th>'
        '<th style="text-align:left">taken for</th><th>images</th><th>of its class</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def recalls(values: Sequence[tuple[str, float | None, int]], most: int = 10) -> str:
    """The classes found least, as bars; `values` are (class, recall or None, test images)."""
    known = sorted((v for v in values if v[1] is not None), key=lambda v: v[1] or 0.0)
    bars = "".join(
        f'<span class="name" title="{esc(name)}">{esc(name)}</span><span class="track">'
        f'<i style="width:{100 * part:.1f}%;background:var(--own)"></i></span>'
        f'<span class="value">{share(part)} <span class="soft">of {shown:,}</span></span>'
        for name, part, shown in known[:most]
        if part is not None
    )
    return f'<div class="bars">{bars}</div>'
