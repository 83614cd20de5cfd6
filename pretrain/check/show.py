"""A report as text; a number is shown by the unit that its name ends in."""

from __future__ import annotations

from typing import Any

from pretrain.check import Report


def show(report: Report) -> str:
    """The report for a person: sections, then what is worth knowing, then the problems."""
    lines = []
    for title, section in report.sections.items():
        lines += ["", title]
        for part in section if isinstance(section, list) else [section]:
            lines += [line for name, value in part.items() for line in _lines(name, value)]
    lines += ["", *(f"note: {note}" for note in report.notes)]
    lines += [f"PROBLEM: {problem}" for problem in report.problems]
    lines.append(f"{len(report.problems)} problem(s)" if report.problems else "nothing is wrong")
    return "\n".join(lines[1:])


def _lines(name: str, value: Any) -> list[str]:
    label = "time" if name == "time_s" else name.removesuffix("_bytes").replace("_", " ")
    if isinstance(value, dict) and all(inner.endswith("_bytes") for inner in value):
        sizes = ", ".join(f"{inner.removesuffix('_bytes')} {_value(inner, one)}" for inner, one in value.items())
        return [f"  {label:<36} {sizes}"]
    if isinstance(value, dict):
        return [f"  {label}", *(f"    {inner:<34} {_value(name, one)}" for inner, one in value.items())]
    return [f"  {label:<36} {_value(name, value)}"]


def _value(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return f"{value / 2**30:,.2f} GiB" if value >= 2**28 else f"{value / 2**20:,.1f} MiB"
    if name == "time_s":
        return f"{value / 3600:,.1f} hours" if value >= 3600 else f"{value / 60:.1f} minutes"
    if isinstance(value, float):
        return f"{value:,.10g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
