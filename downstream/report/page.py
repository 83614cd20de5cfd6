"""The report: one HTML file that opens without a server and without a network, pictures and script inside.

Written by hand as strings: the page has six kinds of block, and a template language would be one more thing
to install. Everything that comes from data passes `markup` on its way in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from downstream import results as files
from downstream.report import curves
from downstream.report.glossary import task
from downstream.report.sections import Pictures, section
from downstream.report.style import CSS, JS
from downstream.report.tables import Column, card, columns
from downstream.results import Result
from pretrain.durable import write_text
from pretrain.errors import UserError
from pretrain.markup import document, esc, isolated, number

TASK_ORDER = ("zeroshot_retrieval", "zeroshot_classification", "knn", "spectrum", "class_relations")


@dataclass
class Evaluation:
    """All results of one task on one data set, with their pictures, and where they stand in the page."""

    columns: list[Column]
    pictures: list[Pictures]
    anchor: str


@dataclass
class Found:
    """What a folder or file named by the user held."""

    results: list[tuple[Path, Result]] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)


def collect(places: Iterable[Path]) -> Found:
    """The results in these folders and files. A file that is no result is passed over and named in the
    report.

    Raises:
        UserError: a place does not exist.
    """
    found = Found()
    for place in places:
        if not place.exists():
            raise UserError(f"{place}: no such folder or file of results")
        for path in sorted(place.glob("*.json")) if place.is_dir() else [place]:
            try:
                found.results.append((path, files.read(path)))
            except UserError as error:
                found.passed_over.append(str(error))
    return found


def evaluations(found: Found, run: str) -> list[Evaluation]:
    """Results sorted into one evaluation for each task and data set, the tasks in their usual order."""
    order = {name: i for i, name in enumerate(TASK_ORDER)}

    def key(entry: tuple[Path, Result]) -> tuple:
        return order.get(entry[1].task, len(order)), entry[1].task, entry[1].dataset

    made = []
    for i, (_, entries) in enumerate(groupby(sorted(found.results, key=key), key)):
        group = list(entries)
        paths = {id(r): path for path, r in group}
        cols = columns([r for _, r in group], run)
        made.append(Evaluation(cols, [files.read_pictures(paths[id(c.result)]) for c in cols], f"evaluation-{i + 1}"))
    return made


def page(
    run: str,
    facts: Mapping[str, Any],
    lines: Iterable[Mapping[str, Any]],
    found: Found,
) -> str:
    """The whole report as HTML. `facts`: what stands under the title; `lines`: the run's log."""
    done = evaluations(found, run)
    body = [_summary(done), *(section(e.columns, e.pictures, e.anchor) for e in done)]
    body += ['<h2 id="training">Training</h2>', curves.section(lines), _how_to_read(done, found)]
    head = f"{_facts(facts)}{_navigation(done)}"
    return document(f"{run} · report", run, head, "".join(body), style=CSS, script=JS)


def write_alone(evaluated: Sequence[tuple[Result, Pictures]], folder: Path) -> Path:
    """A page of one evaluation of one data set, beside its results; the first of them is the one reported."""
    first = evaluated[0][0]
    by_result = {id(r): pictures for r, pictures in evaluated}
    cols = columns([r for r, _ in evaluated], str(first.details.get("run", "")))
    body = section(cols, [by_result[id(c.result)] for c in cols], "evaluation")
    path = folder / f"{first.stem}.html"
    title = f"{task(first.task).title} · {first.pretrained}"
    write_text(path, document(title, first.pretrained, "", body, style=CSS, script=JS))
    return path


def _facts(facts: Mapping[str, Any]) -> str:
    shown = "".join(
        f"<div><dt>{esc(name)}</dt><dd>{isolated(number(v) if isinstance(v, int | float) else v)}</dd></div>"
        for name, v in facts.items()
        if v is not None
    )
    return f'<dl class="facts">{shown}</dl>'


def _navigation(done: Sequence[Evaluation]) -> str:
    links = [(e.anchor, f"{task(e.columns[0].result.task).title}: {e.columns[0].result.dataset}") for e in done]
    links += [("training", "Training"), ("reading", "How to read this")]
    return "<nav>" + "".join(f'<a href="#{anchor}">{esc(title)}</a>' for anchor, title in links) + "</nav>"


def _summary(done: Sequence[Evaluation]) -> str:
    if not done:
        return (
            '<p class="card empty">No evaluation results were given. Make some with '
            "<code>python -m downstream retrieval | knn | zeroshot CHECKPOINT … --out DIR</code> "
            "and name the folder with <code>--results DIR</code>.</p>"
        )
    cards = "".join(card(e.columns, e.anchor) for e in done)
    return f'<h2 id="summary">At a glance</h2><div class="grid">{cards}</div>'


def _how_to_read(done: Sequence[Evaluation], found: Found) -> str:
    methods = sorted(
        {str(c.result.details["intervals"]) for e in done for c in e.columns if "intervals" in c.result.details}
    )
    lines = [
        "Chance is what guessing gives: of 200 photographs a caption finds its own first once in 200.",
        "Untrained is the same architecture with random weights: what it reaches is owed to the "
        "architecture and to the data (colours, layout), not to training.",
        "Two results whose intervals do not overlap differ by more than the choice of these test images "
        "explains; training again with another seed moves figures too, and is not in the interval.",
        *(f"Intervals: {m}." for m in methods),
        *(f"Passed over: {p}" for p in found.passed_over),
    ]
    sources = "".join(f"<li>{_encoder(c.name, c.result)}</li>" for c in _weights(done))
    items = "".join(f"<li>{isolated(line)}</li>" for line in lines)
    weights = f"<h3>Encoders</h3><ul class='notes soft'>{sources}</ul>" if sources else ""
    title = '<h2 id="reading">How to read this</h2>'
    return f'{title}<div class="card"><ul class="notes">{items}</ul>{weights}</div>'


def _weights(done: Sequence[Evaluation]) -> list[Column]:
    """One column for each encoder in the report."""
    seen: dict[tuple, Column] = {}
    for column in (c for e in done for c in e.columns):
        key = (column.result.pretrained, column.result.model, column.result.details.get("features"))
        seen.setdefault(key, column)
    return list(seen.values())


def _encoder(name: str, result: Result) -> str:
    features = result.details.get("features")
    parts = [result.model, *([f"{features} features"] if features else [])]
    mark = result.details.get("fingerprint")
    shown = f", fingerprint <code>{esc(str(mark)[:16])}</code>" if mark else ""
    return f"{isolated(name)}: {isolated(', '.join(parts))}{shown}"
