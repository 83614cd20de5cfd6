"""Relations of classes: the matrix as a picture, and the pairs at its ends as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from downstream.report.markup import image, short
from pretrain.markup import esc, isolated, number

LISTS = (
    ("related", "Most alike", "cosine of their gates"),
    ("open", "Most dimensions in common", "dimensions open"),
    ("closed", "Fewest dimensions in common", "dimensions open"),
)


def figure(data: Mapping[str, Any]) -> str:
    """What `downstream relations` found, as HTML; empty where there is nothing to show."""
    tables = "".join(_table(title, head, data.get(kind, ())) for kind, title, head in LISTS)
    return _matrix(data) + (f'<div class="grid">{tables}</div>' if tables else "")


def _matrix(data: Mapping[str, Any]) -> str:
    if not data.get("matrix"):
        return ""
    several = int(data.get("classes_a_cell", 1))
    told = "a row and a column a class" if several == 1 else f"each cell the mean over {several} × {several} classes"
    order = [str(name) for name in data.get("order", ())]
    along = f", from {short(order[0], 24)} to {short(order[-1], 24)}" if len(order) > 1 else ""
    drawn = image(data["matrix"], "relations of all classes", 'style="width:min(100%,640px);image-rendering:pixelated"')
    caption = f"Related classes stand together: {told}{along}. Blue: alike; red: opposite; white: unrelated."
    return f'<figure style="margin:0 0 14px">{drawn}<figcaption>{isolated(caption)}</figcaption></figure>'


def _table(title: str, head: str, pairs: Sequence[Sequence[Any]]) -> str:
    if not pairs:
        return ""
    rows = "".join(
        f'<tr><td style="text-align:left">{isolated(short(a, 40))}</td>'
        f'<td style="text-align:left">{isolated(short(b, 40))}</td><td>{number(score)}</td></tr>'
        for a, b, score in pairs
    )
    return (
        f'<div><h3>{esc(title)}</h3><div class="wide"><table><thead><tr><th></th><th></th><th>{esc(head)}</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div></div>"
    )
