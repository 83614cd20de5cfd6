"""End the jobs of a run, or of a folder of runs or a pipeline; with --save-first not one step is lost.

A run that is submitted again goes on from its newest save. Without --save-first what came after that is done again.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slurm.cancel import Cancelled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="RUN|JOB", help="a run, a folder with several jobs, or a job's number")
    parser.add_argument("--save-first", action="store_true", help="wait until what runs is saved")
    parser.add_argument("--limit-s", type=float, default=1800, help="seconds that the save may take (default 1800)")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    from pretrain.errors import UserError
    from slurm import queue
    from slurm.cancel import cancel, running_here, save_and_cancel

    jobs = queue.belonging(args.what, queue.queued() if queue.here() else [])
    if not jobs:
        raise UserError(f"no job of {args.what} is in the queue{running_here(args.what)}")
    if args.save_first:
        ended = save_and_cancel(jobs, args.limit_s, lambda told: print(told, file=sys.stderr, flush=True))
    else:
        ended = [cancel(job) for job in jobs]
    if args.json:
        import dataclasses
        import json

        print(json.dumps([dataclasses.asdict(one) | {"lost": one.lost} for one in ended], indent=1))
    else:
        print("\n".join(map(_line, ended)))
    return 0


def _line(one: Cancelled) -> str:
    if one.run is None:
        return f"job {one.job}: cancelled"
    if one.step is None:
        return f"job {one.job} of {one.run}: cancelled before it began"
    kept = f"step {one.saved:,} is saved" if one.saved is not None else "nothing was saved"
    lost = f", at least {one.lost:,} steps are lost" if one.lost else ", no step is lost"
    return f"job {one.job} of {one.run}: cancelled at step {one.step:,}; {kept}{lost}"
