"""How runs stand: in the queue, how far, how fast, what ended the last attempt; one run alone is looked at closely.

Without arguments: the runs under ./runs, and all jobs of yours that polyview has submitted. Works without Slurm too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slurm.details import Details
    from slurm.queue import Queued
    from slurm.status import Status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN|FOLDER", help="runs, or folders of runs")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    from slurm.details import details
    from slurm.status import Jobs, find, look, statuses

    jobs, silent = _queued()
    if silent:
        print(f"status: Slurm does not answer ({silent}): what follows is what the folders tell", file=sys.stderr)
    runs = find(args.runs, jobs)
    shown = statuses(runs, _meant(args.runs, jobs))
    one = details(look(runs[0], Jobs(jobs))) if len(args.runs) == len(runs) == 1 else None
    if args.json:
        _print_json(shown, one, silent)
    elif not shown:
        print("no runs under ./runs, and no jobs in the queue: give a run's folder")
    else:
        print("\n".join(table(shown)))
        if one is not None:
            print("\n".join(["", *lines(one, runs[0])]))
    return 0


def table(shown: list[Status]) -> list[str]:
    """The lines of the table."""
    head = ("RUN", "STATE", "STEP", "IMAGES/S", "ETA", "LOSS", "RESTARTS", "LAST END", "WHERE OR WHY")
    rows = [head, *(_row(status) for status in shown)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def lines(one: Details, run: Path) -> list[str]:
    """What is told of one run below its line."""
    from slurm.suspects import without

    told = [f"ATTENTION: {line}" for line in one.ranks]
    told += _attempts(one.attempts)
    if command := without(run, one.suspects):
        lost = ", ".join(f"{node} (in {times} attempt{'s' * (times > 1)})" for node, times in one.suspects.items())
        told.append(f"suspect:    {lost} fell silent before the others; to leave out: {command}")
    told.append(f"checkpoint: {one.checkpoint or 'none yet'}")
    told.append(f"logs:       {one.logs or 'not a job: where it was started'}")
    return told


def _attempts(attempts: list[dict[str, Any]]) -> list[str]:
    if not attempts:
        return []
    rows = [("JOB", "RESTART", "NODES", "BEGAN", "ENDED", "HOW")]
    for a in attempts:
        ended = _clock(a["ended"]) if a["ended"] else "-"
        rows.append((a["job"], str(a["restart"]), ",".join(a["nodes"]), _clock(a["began"]), ended, a["how"]))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _row(status: Status) -> tuple[str, ...]:
    from pretrain.telemetry.progress import duration

    total = "?" if status.total_steps is None else f"{status.total_steps:,}"
    return (
        status.run,
        status.state,
        "-" if status.step is None else f"{status.step:,}/{total}",
        "-" if status.images_per_s is None else f"{status.images_per_s:,.4g}",
        "-" if status.eta_s is None else duration(status.eta_s),
        "-" if status.loss is None else f"{status.loss:.4g}",
        str(status.restarts),
        status.last_end or "-",
        status.detail if status.detail else "-",
    )


def _queued() -> tuple[list[Queued], str | None]:
    """This user's jobs, and why Slurm does not tell them where it should; without Slurm there are none."""
    from pretrain.errors import UserError
    from slurm import queue

    if not queue.here():
        return [], None
    try:
        return queue.queued(), None
    except UserError as error:
        return [], str(error)


def _meant(asked: list[Path], jobs: list[Queued]) -> list[Queued]:
    """Those of `jobs` that belong to what is asked for; nothing asked for means all."""
    from slurm.queue import belonging

    return list({job.job: job for what in asked for job in belonging(what, jobs)}.values()) if asked else jobs


def _clock(at: float) -> str:
    import datetime

    return datetime.datetime.fromtimestamp(at).strftime("%m-%d %H:%M:%S")


def _print_json(shown: list[Status], one: Details | None, silent: str | None) -> None:
    import dataclasses
    import json

    told: dict[str, Any] = {"runs": [dataclasses.asdict(status) for status in shown], "slurm": silent}
    if one is not None:
        told["details"] = dataclasses.asdict(one)
    print(json.dumps(told, indent=1))
