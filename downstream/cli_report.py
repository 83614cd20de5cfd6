"""One HTML page of a run and its evaluations that opens without a server: curves, tables, examples, maps."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="results of this run, the untrained encoder, controls: folders or files (default: RUN/results)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page to write, e.g. report.html")


def run(args: argparse.Namespace) -> int:
    from downstream.report.page import collect, page
    from downstream.report.run import facts, log_lines, run_name

    name = run_name(args.run)
    standard = args.run / "results"
    found = collect(args.results or ([standard] if standard.is_dir() else []))
    lines = log_lines(args.run)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(name, facts(args.run, lines), lines, found), "utf-8")
    print(f"{args.out}: {len(found.results)} results, {args.out.stat().st_size / 2**20:.1f} MiB")
    for reason in found.passed_over:
        print(f"  passed over: {reason}")
    return 0
