"""One evaluation of one data set as a section of the report: its table, and the pictures that go with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from downstream.report import confusion, gallery, relations, scatter, spectra
from downstream.report.glossary import task
from downstream.report.tables import Column, is_untrained, table
from pretrain.markup import esc, isolated

Pictures = Mapping[str, Any]


def section(cols: Sequence[Column], pictures: Sequence[Pictures], anchor: str) -> str:
    """Table and pictures of what was evaluated on one data set; `pictures` goes with `cols`, empty where
    none.

    Examples are the first column's; the untrained encoder's map stands beside the trained one's.
    """
    first = cols[0].result
    about = task(first.task)
    shown = pictures[0]
    parts = [
        f'<h2 id="{anchor}">{esc(about.title)}: {isolated(first.dataset)}</h2>',
        f'<p class="lead">{esc(about.line)}</p>',
        f'<div class="card">{table(cols)}{_notes(cols)}</div>',
        _examples(
            "What captions find",
            "The best photographs for a caption, best first, with their cosine. The caption's own is "
            "framed; where it is not among the best it stands apart, with its place.",
            gallery.captions(shown.get("captions", ())),
            shown,
        ),
        _examples(
            "What photographs find",
            "The nearest captions of all, best first; the photograph's own are marked.",
            gallery.photographs(shown.get("photographs", ())),
            shown,
        ),
        _examples(
            "What images are called",
            "The nearest class names, best first; the right one is marked.",
            gallery.photographs(shown.get("named", ()), "right name"),
            shown,
        ),
        _examples(
            "Nearest neighbours",
            "Images and those most alike to the encoder, with their cosine; where there are labels, "
            "neighbours of the same class are framed.",
            gallery.neighbours(shown.get("neighbours", ())),
            shown,
        ),
        _confusion(shown.get("confusion")),
        _spectra(cols, pictures),
        _relations(shown.get("relations")),
        _maps(cols, pictures, anchor),
    ]
    return "".join(parts)


def _notes(cols: Sequence[Column]) -> str:
    notes = {f"{c.name}: {note}": None for c in cols for note in c.result.details.get("notes", ())}
    facts = [_counts(c) for c in cols]
    lines = "".join(f"<li>{isolated(line)}</li>" for line in [*(f for f in facts if f), *notes])
    return f'<ul class="notes soft">{lines}</ul>' if lines else ""


def _counts(column: Column) -> str:
    """What was evaluated, in words: "run@step: 200 images, 1,000 captions"."""
    counts = column.result.details.get("counts", {})
    told = ", ".join(f"{what} {n:,}" for what, n in counts.items() if isinstance(n, int))
    return f"{column.name}: {told}" if told else ""


def _examples(title: str, line: str, body: str, pictures: Pictures) -> str:
    if not body:
        return ""
    chosen = f" {pictures['chosen']}" if pictures.get("chosen") else ""
    return f'<div class="card"><h3>{esc(title)}</h3><p class="soft">{esc(line + chosen)}</p>{body}</div>'


def _confusion(data: Mapping[str, Any] | None) -> str:
    if not data or not data.get("classes"):
        return ""
    names, counts = data["classes"], data.get("counts")
    drawn = ""
    if counts and len(counts) <= confusion.MOST_CLASSES:
        drawn = f'<div class="matrix wide">{confusion.matrix(counts, names)}</div>'
    worst = confusion.mistakes(data.get("mistakes", ()))
    least = confusion.recalls(data.get("recalls", ()))
    line = "The pairs most often mistaken, and the classes found least."
    if drawn:
        line = (
            "Rows: the right class; columns: what was predicted; shade: the share of the row. "
            "A blue diagonal and nothing else would be perfect."
        )
    return (
        f'<div class="card"><h3>Which classes are taken for which</h3><p class="soft">{line}</p>'
        f'<div class="two">{drawn}'
        f"<div><h3>Most frequent mistakes</h3>{worst}<h3>Classes found least</h3>{least}</div></div></div>"
    )


def _spectra(cols: Sequence[Column], pictures: Sequence[Pictures]) -> str:
    drawn = spectra.charts([(c.name, c.colour, p["spectrum"]) for c, p in zip(cols, pictures) if p.get("spectrum")])
    line = (
        "Singular values of the covariance as shares of the largest, sorted. A line that falls off a cliff is a "
        "collapse: the features live in the directions before it."
    )
    return f'<div class="card"><h3>Spectrum</h3><p class="soft">{esc(line)}</p>{drawn}</div>' if drawn else ""


def _relations(data: Mapping[str, Any] | None) -> str:
    drawn = relations.figure(data) if data else ""
    return f'<div class="card"><h3>Which classes are alike</h3>{drawn}</div>' if drawn else ""


def _maps(cols: Sequence[Column], pictures: Sequence[Pictures], anchor: str) -> str:
    shown = [(cols[0].name, pictures[0]["map"])] if pictures[0].get("map") else []
    beside = next(
        ((c.name, p["map"]) for c, p in zip(cols[1:], pictures[1:]) if is_untrained(c.result) and p.get("map")),
        None,
    )
    shown += [beside] if beside and shown else []
    if not shown:
        return ""
    line = (
        "Each point is an image; near points are alike to the encoder. Point at one to see it. Distances "
        "between far groups mean little: the map keeps neighbourhoods, not directions."
    )
    return (
        f'<div class="card"><h3>Map of the embeddings</h3><p class="soft">{esc(line)}</p>'
        f"{scatter.maps(shown, f'{anchor}-map')}</div>"
    )
