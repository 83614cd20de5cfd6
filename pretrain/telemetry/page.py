"""The page of a run, RUN/index.html: how far it is, where its time goes, its curves, events, starts and recipe.

One file that needs no server and no network. While the run goes on it loads itself again every half minute.
"""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from pretrain.durable import write_text
from pretrain.errors import UserError
from pretrain.markup import document, esc, isolated, number
from pretrain.telemetry.alive import alive
from pretrain.telemetry.figures import GROUPS, about, group, place
from pretrain.telemetry.history import History
from pretrain.telemetry.page_script import SCRIPT, STYLE
from pretrain.telemetry.progress import duration

log = logging.getLogger(__name__)

FILE = "index.html"
RELOAD_S = 30
SHARE_OF_TIME = 1e-3
"""What writing may take of the run's time: after a second of it none for the next thousand."""
STATES = {
    "running": "right", "finished": "right", "stopped": "", "ended without a word": "wrong", "not begun": "",
}  # fmt: skip
MARKED = ("resume", "spike", "non-finite", "left-out", "warning", "straggler", "save-failed")
"""Events that stand as lines in every curve."""


class RunPage:
    """The page of the run in `folder`, written again and again while its log grows."""

    def __init__(self, folder: Path, out: Path | None = None, may_write: Callable[[], None] = lambda: None) -> None:
        self._may_write = may_write
        self._folder, self._out = folder, out or folder / FILE
        self._history = History(folder / "log.jsonl")
        self._rest_until = 0.0
        self._warned = False

    def write(self, *, now: bool = False) -> None:
        """Bring the page up to date, unless that was done a moment ago; with `now` in any case. Never raises for a
        disk that is full, but what `may_write` raises where a later start has taken the run over."""
        begin = time.monotonic()
        if begin < self._rest_until and not now:
            return
        try:
            write_text(self._out, self.html(), ready=self._may_write)
        except OSError as error:
            if not self._warned:
                log.warning(f"{self._out} is not up to date ({error.strerror})")
            self._warned = True
        end = time.monotonic()
        self._rest_until = end + (end - begin) / SHARE_OF_TIME

    def html(self) -> str:
        """The page as it is now."""
        self._history.update()
        recipe, history = _recipe(self._folder), self._history
        state = _state(self._folder, history)
        name = _named(recipe) or self._folder.name
        body = [
            _time_bar(history.line),
            _charts(history),
            f"<h2>Events</h2>{_events(history)}",
            f"<h2>Starts</h2>{_starts(self._folder)}",
            f'<h2>Recipe</h2><pre class="card wide"><code>{esc(recipe)}</code></pre>',
        ]
        more = f'<meta http-equiv="refresh" content="{RELOAD_S}">' if state == "running" else ""
        head = _head(history, state)
        return document(f"{name} · run", name, head, "".join(body), style=STYLE, script=SCRIPT, more=more)


def write_page(folder: Path, out: Path | None = None) -> Path:
    """Write the page of the run in `folder` to `out`, RUN/index.html unless given; where it is.

    Raises:
        UserError: `folder` is no run; the page cannot be written.
    """
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not a run: it has no recipe.yaml")
    target = out or folder / FILE
    try:
        write_text(target, RunPage(folder).html())
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); choose another place with --out") from None
    return target


def _recipe(folder: Path) -> str:
    try:
        return (folder / "recipe.yaml").read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _named(recipe: str) -> str | None:
    try:
        found = yaml.safe_load(recipe)
    except yaml.YAMLError:
        return None
    return str(found["name"]) if isinstance(found, dict) and "name" in found else None


def _state(folder: Path, history: History) -> str:
    """One of STATES: by the run's own last word, and whether somebody still trains."""
    last = next((e["event"] for e in reversed(history.events) if e["event"] in ("start", "resume", "stop", "end")), "")
    if last in ("end", "stop"):
        return {"end": "finished", "stop": "stopped"}[last]
    if alive(folder):
        return "running"
    return "ended without a word" if last else "not begun"


def _head(history: History, state: str) -> str:
    line, total = history.line, history.total_steps
    step = line.get("step", 0)
    left = (total - step) * _float(line.get("step_s")) if total else 0
    facts = {
        "Step": f"{step:,} of {total:,}" if total else f"{step:,}",
        "Time left": duration(left) if state == "running" and left > 0 else None,
        "Loss": number(line["loss"]) if line.get("loss") is not None else None,
        "Images a second": number(line.get("images_per_s")) if "images_per_s" in line else None,
        "MFU": f"{_float(line['mfu']):.1%}" if "mfu" in line else None,
        "Memory": f"{_float(line['memory_gib']):.1f} GiB" if "memory_gib" in line else None,
        "Epochs": number(line.get("epoch")) if "epoch" in line else None,
        "Last line": _moment(line.get("time")) if line else None,
    }
    shown = "".join(f"<div><dt>{esc(k)}</dt><dd>{esc(v)}</dd></div>" for k, v in facts.items() if v is not None)
    done = f'<div class="done"><i style="width:{min(100.0, 100 * step / total):.2f}%"></i></div>' if total else ""
    return f'<span class="tag {STATES[state]}">{esc(state)}</span><dl class="facts">{shown}</dl>{done}'


def _time_bar(line: Mapping[str, Any]) -> str:
    """Where a step's time goes, as shares of a bar, by the newest line."""
    spent = {k[5:-2]: _float(v) for k, v in line.items() if k.startswith("time/") and k.endswith("_s")}
    whole = sum(spent.values())
    if whole <= 0:
        return ""
    parts = [
        (f"{esc(name)}: {100 * s / whole:.1f} %, {number(s)} s a step", i % 8, 100 * s / whole)
        for i, (name, s) in enumerate(spent.items())
    ]
    bar = "".join(f'<i class="c{c}" style="width:{w:.2f}%" title="{told}"></i>' for told, c, w in parts)
    legend = "".join(f'<span><i class="key c{c}"></i>{told}</span>' for told, c, _ in parts)
    return f'<section class="card"><h3>Where a step\'s time goes</h3><div class="stack">{bar}</div>' + (
        f'<div class="legend">{legend}</div></section>'
    )


def _charts(history: History) -> str:
    """Places for the curves, by group, and their points as JSON; the script draws them."""
    if not history.curves:
        return '<p class="card empty">The run has logged no steps yet.</p>'
    names = sorted(history.curves, key=place)
    points = {name: [[s, float(f"{v:.6g}")] for s, v in history.curves[name].points()] for name in names}
    data = {"curves": list(points.values()), "marks": list(_marks(history))}
    cards = {name: _card(i, name, history.curves[name].last) for i, name in enumerate(names)}
    groups = "".join(
        f'<h2>{esc(g)}</h2><div class="grid">{"".join(cards[n] for n in names if group(n) == g)}</div>'
        for g in GROUPS
        if any(group(n) == g for n in names)
    )
    switches = (
        '<p class="switches"><label><input type="checkbox" id="smooth" checked> smoothed</label>'
        '<label><input type="checkbox" id="log"> logarithmic</label></p>'
    )
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'{switches}{groups}<script type="application/json" id="data">{text}</script>'


def _card(index: int, name: str, last: tuple[float, float] | None) -> str:
    title, line = about(name)
    return (
        f'<section class="card"><h3>{isolated(title)}<span class="now">{number(last[1] if last else None)}</span></h3>'
        f'<p class="soft" title="{esc(name)}">{esc(line) or "&nbsp;"}</p>'
        f'<svg class="curve" data-curve="{index}" viewBox="0 0 340 170" role="img" aria-label="{esc(title)}"></svg>'
        "</section>"
    )


def _marks(history: History) -> Iterable[tuple[float, str]]:
    for event in history.events:
        if event["event"] in MARKED and isinstance(event.get("step"), int):
            yield event["step"], str(event["event"])


def _events(history: History) -> str:
    if not history.events:
        return '<p class="card empty">None yet.</p>'
    counted = ", ".join(f"{n:,} × {kind}" for kind, n in history.counts.items())
    rows = "".join(
        f"<tr><td>{_moment(e.get('time'))}</td><td>{esc(e.get('step', ''))}</td><th>{isolated(e['event'])}</th>"
        f"<td>{esc('; '.join(f'{k}: {v}' for k, v in e.items() if k not in ('time', 'step', 'event')))}</td></tr>"
        for e in reversed(history.events)
    )
    return (
        f'<p class="soft">{esc(counted)}; the newest first.</p><div class="card wide tall"><table class="lines"><thead>'
        f"<tr><th>UTC</th><th>step</th><th>event</th><th></th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _starts(folder: Path) -> str:
    try:
        starts = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        starts = []
    if not isinstance(starts, list) or not starts:
        return '<p class="card empty">None noted.</p>'
    return "".join(_start(s) for s in reversed(starts) if isinstance(s, dict))


def _start(start: dict[str, Any]) -> str:
    said = f"{start.get('date', '')} · {start.get('host', '')} · from step {start.get('from_step', 0)}"
    said += f" · {start.get('world', 1)} ranks"
    rows = "".join(
        f"<tr><th>{esc(name)}</th><td>{esc(_told(value))}</td></tr>" for name, value in start.items() if value
    )
    return (
        f'<details class="card"><summary>{isolated(said)}</summary>'
        f'<div class="wide"><table class="lines">{rows}</table></div></details>'
    )


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _moment(seconds: Any) -> str:
    try:
        return datetime.datetime.fromtimestamp(float(seconds), datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def _float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
