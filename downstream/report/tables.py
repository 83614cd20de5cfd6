"""The figures: what stands on top of the report, and one table for each evaluation of each data set.

A table compares what was evaluated on the same data: this run, the untrained encoder, controls and other
runs, always with chance beside them, so that no number has to be judged alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from downstream.report.charts import scale, strip
from downstream.report.glossary import Meaning, meaning, task
from downstream.report.markup import share
from downstream.results import UNTRAINED, Result
from pretrain.markup import esc, isolated, number

OWN, BASE = "var(--own)", "var(--base)"
OTHERS = ("var(--other)", "var(--third)", "var(--right)")


@dataclass(frozen=True)
class Column:
    """One result among those of the same evaluation and data."""

    result: Result
    name: str
    colour: str
    own: bool


def columns(results: Sequence[Result], run: str) -> list[Column]:
    """This run first (its latest step first), then the untrained encoder, then others by name."""

    def order(r: Result) -> tuple:
        return (not is_own(r, run), not is_untrained(r), -(r.details.get("step") or 0), r.model, r.pretrained)

    ordered = sorted(results, key=order)
    models = {r.model for r in ordered}
    others = iter(range(len(ordered)))
    made: list[Column] = []
    for r in ordered:
        own = is_own(r, run) and not any(c.own for c in made)
        colour = OWN if own else BASE if is_untrained(r) else OTHERS[next(others) % len(OTHERS)]
        name = r.pretrained if len(models) == 1 or own else f"{r.pretrained} · {r.model}"
        made.append(Column(r, name, colour, own))
    return made


def is_own(result: Result, run: str) -> bool:
    """Whether the result is of the reported run's trained weights, not of a control or of another run."""
    return result.details.get("run") == run and result.details.get("role") == "trained"


def is_untrained(result: Result) -> bool:
    """Whether the result is of the architecture at its random initialisation."""
    return result.details.get("role") == "untrained" or result.pretrained == UNTRAINED


def card(cols: Sequence[Column], anchor: str) -> str:
    """The headline of one evaluation: the figure that stands for it, beside what it has to beat."""
    first = cols[0].result
    about = task(first.task)
    metric = next((m for m in about.headline if first.metrics.get(m) is not None), None)
    if metric is None:
        return ""
    value, interval = first.metrics[metric], first.intervals.get(metric)
    means = meaning(metric)
    rows = [(c.name, c.result.metrics.get(metric), c.colour) for c in cols]
    rows.append(("chance", first.chance.get(metric), "var(--line)"))
    top = max([v for _, v, _ in rows if v is not None] + [1e-9])
    bars = "".join(_bar(name, v, colour, top) for name, v, colour in rows if v is not None)
    within = f" <small>95 %: {_range(interval, means)}</small>" if interval else ""
    return (
        f'<section class="card"><h3><a href="#{anchor}">{esc(about.title)}</a></h3>'
        f'<p class="soft">{isolated(first.dataset)} · {esc(means.label)}</p>'
        f'<div class="big">{show(value, means)}{within}</div><div class="bars">{bars}</div>'
        f'<p class="soft">{esc(verdict(cols, metric))}</p></section>'
    )


def _bar(name: str, value: float, colour: str, top: float) -> str:
    return (
        f'<span class="name" title="{esc(name)}">{esc(name)}</span><span class="track">'
        f'<i style="width:{100 * value / top:.1f}%;background:{colour}"></i></span>'
        f'<span class="value">{share(value)}</span>'
    )


def verdict(cols: Sequence[Column], metric: str) -> str:
    """One sentence: how the first result stands against chance and against the untrained encoder."""
    first = cols[0].result
    value, guess = first.metrics.get(metric), first.chance.get(metric)
    parts = []
    if value is not None and guess:
        times = value / guess
        parts.append(f"{times:.0f} times chance" if times >= 10 else f"{times:.2g} times chance")
    for c in cols[1:]:
        if is_untrained(c.result) and (said := _against(first, c.result, metric)):
            parts.append(f"{said} the untrained encoder")
            break
    return (", ".join(parts) + ".").capitalize() if parts else ""


def _against(a: Result, b: Result, metric: str) -> str:
    """Whether the two intervals are apart: a cautious test (they may overlap and still differ)."""
    mine, theirs = a.intervals.get(metric), b.intervals.get(metric)
    if not mine or not theirs:
        return ""
    if mine[0] > theirs[1]:
        return "clearly above"
    return "clearly below" if mine[1] < theirs[0] else "not clearly apart from"


def table(cols: Sequence[Column]) -> str:
    """Every metric of one evaluation on one data set: a row each, a column for each result, chance last."""
    names = list(dict.fromkeys(m for c in cols for m in c.result.metrics))
    top = _tops(cols, names)
    heads = "".join(
        f'<th scope="col"><span class="key" style="background:{c.colour}"></span>{isolated(c.name)}</th>' for c in cols
    )
    plot = f'<th class="plot" scope="col">{_axis_words(top)}</th>'
    body = "".join(_row(m, cols, top) for m in names)
    return (
        '<div class="wide"><table class="metrics"><thead><tr><th></th>'
        f'{plot}{heads}<th scope="col">chance</th></tr></thead><tbody>{body}</tbody></table></div>'
    )


def _tops(cols: Sequence[Column], names: Sequence[str]) -> dict[str, float]:
    """The end of the axis for each kind of metric: all shares of a table stand on one axis."""
    tops: dict[str, float] = {}
    for name in names:
        seen = [v for c in cols for v in (c.result.metrics.get(name), c.result.chance.get(name)) if v is not None]
        seen += [c.result.intervals[name][1] for c in cols if name in c.result.intervals]
        kind = meaning(name).kind
        tops[kind] = max([tops.get(kind, 0.0), *seen])
    if "share" in tops:
        tops["share"] = min(scale([0.0, max(tops["share"], 0.01)])[-1], 1.0)
    return tops


def _axis_words(tops: dict[str, float]) -> str:
    words = []
    if "share" in tops:
        words.append(f"0 to {100 * tops['share']:.3g} %")
    if "rank" in tops:
        words.append(f"ranks: 1 to {tops['rank']:,.0f}, by powers")
    return esc("; ".join(words)) + "<br>whisker: 95 %, dashed: chance"


def _row(name: str, cols: Sequence[Column], tops: dict[str, float]) -> str:
    means = meaning(name)
    chance = next((c.result.chance[name] for c in cols if name in c.result.chance), None)
    figures = [(c.result.metrics.get(name), c.result.intervals.get(name), c.colour) for c in cols]
    drawn = ""
    if means.kind != "plain" and any(v is not None for v, _, _ in figures):
        drawn = strip(figures, chance, tops[means.kind], logarithmic=means.kind == "rank")
    cells = "".join(_cell(c, name, means) for c in cols)
    return (
        f'<tr><th scope="row">{esc(means.label)}<small>{esc(means.line)}</small></th>'
        f'<td class="plot">{drawn}</td>{cells}<td data-of="chance">{show(chance, means)}</td></tr>'
    )


def _cell(column: Column, name: str, means: Meaning) -> str:
    interval = column.result.intervals.get(name)
    within = f"<small>{_range(interval, means)}</small>" if interval else ""
    kind = ' class="own"' if column.own else ""
    return f'<td{kind} data-of="{esc(column.name)}">{show(column.result.metrics.get(name), means)}{within}</td>'


def show(value: float | None, means: Meaning) -> str:
    """A figure as its kind is shown."""
    if means.kind == "rank" and value is not None:
        return f"{value:,.0f}"
    return share(value) if means.kind == "share" else number(value)


def _range(interval: Sequence[float], means: Meaning) -> str:
    low, high = (show(v, means).removesuffix("\N{NO-BREAK SPACE}%") for v in interval)
    return f"{low} – {high}"
