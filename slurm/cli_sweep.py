"""Train every combination of some values: a run each, in one job array; a table compares them.

Example: python -m slurm sweep clip-vit-b32-laion400m --grid optimizer.lr=1e-3,3e-4 global_batch=4096,8192 \\
             --parallel 4 --out sweeps/lr

Runs are DIR/NAME, named by their values. The same command sends only what is neither done nor under way; with --table
it shows how they stand, and writes DIR/table.csv and DIR/table.json.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurm.options import add_resources

if TYPE_CHECKING:
    from slurm.sweep import Sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", help="a YAML file, or the name of a shipped recipe")
    add("overrides", nargs="*", metavar="key=value", help="for all runs, for example steps=500")
    add(
        "--grid",
        nargs="+",
        action="extend",
        required=True,
        metavar="key=value,value",
        help="every combination of these is a run",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="the sweep's folder, seen by all nodes")
    add("--parallel", type=int, help="runs at once (default: as many as find room; with --local 1)")
    add_resources(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--dry-run", action="store_true", help="print the script for sbatch; needs no Slurm")
    where.add_argument("--local", action="store_true", help="run them on this machine, without Slurm")
    where.add_argument("--table", action="store_true", help="how the runs stand; sends nothing")
    add("--json", action="store_true", help="the table as JSON")


def run(args: argparse.Namespace) -> int:
    from slurm.sweep import send_left
    from slurm.work import script

    sweep = _sweep(args)
    if args.dry_run:
        print(script(sweep.work(sweep.left, write=False)) if sweep.left else "# all runs are done")
        return 0
    code = 0
    if args.local:
        code = _run_here(sweep)
    elif not args.table:
        sent = send_left(sweep)
        told = f"job {next(iter(sent.values())).partition('_')[0]}: {len(sent)} runs" if sent else "nothing to send"
        print(f"{told}; {len(sweep.trials) - len(sweep.left)} of {len(sweep.trials)} done", file=sys.stderr)
    _tabulate(sweep, args.json)
    return code


def _sweep(args: argparse.Namespace) -> Sweep:
    from pretrain.errors import UserError
    from slurm.options import resources_of, site
    from slurm.profile import load_profile
    from slurm.sweep import Sweep, grid, trials

    if args.parallel is not None and args.parallel < 1:
        raise UserError("--parallel must be at least 1")
    out = args.out.absolute()
    found = trials(args.recipe, args.overrides, grid(args.grid), out)
    profile = site(args, load_profile(args.profile))
    return Sweep(found, out, resources_of(args, profile, found[0].recipe.world), profile, args.parallel)


def _run_here(sweep: Sweep) -> int:
    from slurm.sweep import run_left

    worst = 0
    for trial, code, log in run_left(sweep):
        print(f"{trial.name}: {f'ended with exit code {code}, see {log}' if code else 'done'}", file=sys.stderr)
        worst = worst or code
    return worst


def _tabulate(sweep: Sweep, as_json: bool) -> None:
    from pretrain.durable import write_text
    from slurm.sweep import table

    rows = table(sweep)
    sweep.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows, indent=1) + "\n"
    write_text(sweep.out / "table.json", text)
    write_text(sweep.out / "table.csv", _csv(rows))
    print(text if as_json else _aligned(rows), end="")


def _csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _aligned(rows: list[dict[str, Any]]) -> str:
    # the values say what the name does
    columns = [name for name in rows[0] if name != "run"]
    cells = [columns, *([_cell(row[name]) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "".join(" ".join(c.ljust(w + 1) for c, w in zip(line, widths)).rstrip() + "\n" for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
