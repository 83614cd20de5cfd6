"""Profile a run that is going on, without stopping it: a trace a rank, and a table of the costliest operators.

The run must use log files that this machine sees. Traces open in https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--steps", type=int, default=5, help="steps to record, at most 100 (default 5)")


def run(args: argparse.Namespace) -> int:
    from pretrain.telemetry.profile_request import profile_run

    folder = profile_run(args.run, args.steps)
    traces = sorted(folder.glob("rank_*.json.gz"))
    print((folder / "rank_00000.txt").read_text())
    print(f"{len(traces)} trace{'s' * (len(traces) != 1)}: {folder}/rank_*.json.gz, tables beside them")
    return 0
