"""Results for people: a table for a terminal, a page for a browser. Keys and captions are hostile until
escaped.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

CAPTION = 70  # characters of a caption in the table

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }}
ol {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 1rem;
 padding: 0; list-style: none }}
li {{ border: 1px solid #ddd; border-radius: 6px; padding: .6rem; overflow-wrap: anywhere }}
img {{ width: 100%; height: 160px; object-fit: contain; background: #f4f4f4 }}
small {{ color: #666 }}
</style></head><body>
<h1>{title}</h1><p>{subtitle}</p>
<ol>
{cards}
</ol></body></html>
"""


def printable(text: str, limit: int) -> str:
    """One line without control characters (which would steer a terminal), cut to `limit` characters."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def table(scores: Sequence[float], items: Sequence[dict[str, Any]]) -> str:
    """rank, score, id, key, first caption; a line a hit."""
    rows = [("rank", "score", "id", "key", "caption")]
    for rank, (score, item) in enumerate(zip(scores, items), 1):
        caption = (item["captions"] or [""])[0]
        rows.append(
            (
                str(rank),
                f"{score:.4f}",
                str(item["id"]),
                printable(item["key"], 40),
                printable(caption, CAPTION),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[4]]).rstrip() for row in rows)


def page(
    title: str,
    subtitle: str,
    scores: Sequence[float],
    items: Sequence[dict[str, Any]],
    thumbs: Sequence[bytes],
) -> str:
    """A page that needs no server: pictures are inside it, scripts are forbidden."""
    cards = "\n".join(map(_card, scores, items, thumbs))
    return PAGE.format(title=html.escape(title), subtitle=html.escape(subtitle), cards=cards)


def _card(score: float, item: dict[str, Any], thumb: bytes) -> str:
    picture = base64.b64encode(thumb).decode()
    captions = "<br>".join(html.escape(c) for c in item["captions"])
    key = html.escape(item["key"])
    return (
        f'<li><img src="data:image/jpeg;base64,{picture}" alt="{key}"><br><strong>{score:.4f}</strong> '
        f"<small>id {item['id']} · {key}</small><p>{captions}</p></li>"
    )
