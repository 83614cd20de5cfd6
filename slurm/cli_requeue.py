"""Have a run go on: one that runs saves and goes back into the queue, one that failed or ended is submitted again.

As its last job was, but for the flags given here; with another number of nodes the global batches stay the same. Nodes
that were lost before are named, and left out only with --exclude.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from slurm.options import add_resources

    parser.add_argument("run", type=Path, help="run folder")
    add_resources(parser)
    parser.set_defaults(nodes=None)  # as before
    parser.add_argument("--limit-s", type=float, default=1800, help="seconds that a save may take (default 1800)")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    from slurm import records
    from slurm.resubmit import requeue
    from slurm.suspects import suspects, without

    folder = Path(os.path.abspath(args.run))
    done = requeue(folder, args, lambda told: print(told, file=sys.stderr, flush=True))
    lost = suspects(records.attempts(folder / "slurm"))
    lost = {node: times for node, times in lost.items() if not args.exclude or node not in args.exclude.split(",")}
    if args.json:
        import json

        print(json.dumps(done | {"suspects": lost}, indent=1))
        return 0
    if done["how"] == "submitted":
        print(
            f"job {done['job']}: submitted on {done['nodes']} x {done['ranks_per_node']} ranks; logs in {done['logs']}"
        )
    else:
        print(f"job {done['job']} saves and goes back into the queue; see `python -m slurm status {args.run}`")
    if command := without(args.run, lost):
        print(f"suspect nodes: {', '.join(lost)} fell silent before the others; to leave out: {command}")
    return 0
