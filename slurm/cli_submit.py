"""Submit a recipe as a job through submitit; a job that comes back into the queue goes on with its run.

Example: python -m slurm submit clip-vit-b32-laion400m --nodes 4 --gpus-per-node 8 --profile mysite output=runs/b32

The run's folder is the recipe's `output`: the same command goes on with the same run, another recipe is refused. The
code is copied beside it, so that later edits do not reach jobs that wait. --dry-run prints what sbatch would get.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from slurm.options import add_resources, resources_of, site

if TYPE_CHECKING:
    import submitit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optimizer.lr=1e-3")
    add_resources(parser)
    parser.add_argument("--after", action="append", default=[], metavar="JOB", help="begin when this job ended well")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--dry-run", action="store_true", help="print the script for sbatch; needs no Slurm")
    where.add_argument("--local", action="store_true", help="run the very same job on this machine, without Slurm")
    parser.add_argument("--wait", action="store_true", help="wait for the job; its exit code when it fails")


def run(args: argparse.Namespace) -> int:
    from pretrain.recipe import load_recipe
    from slurm.here import run_here
    from slurm.profile import load_profile
    from slurm.submit import submit, training
    from slurm.wait import outcome
    from slurm.work import Cluster, Work, script

    recipe, profile = load_recipe(args.recipe, args.overrides), site(args, load_profile(args.profile))
    resources = resources_of(args, profile, recipe.world)
    work = training(recipe, resources, profile, after=tuple(args.after), write=not args.dry_run)
    if args.dry_run:
        print(script(work))
        return 0
    cluster: Cluster = "local" if args.local else "slurm"

    def start(work: Work) -> submitit.Job[Any]:
        job = submit(work, cluster)
        shown = f"{resources.nodes_asked} x {resources.ranks_per_node} ranks"
        print(f"job {job.job_id}: {recipe.name} on {shown}; logs in {work.folder}", flush=True)
        return job

    code = 0
    if args.local and args.wait:
        ((_, job, code),) = run_here([work], start, 1)
    else:
        job = start(work)
        if args.wait:
            code = outcome(work, job, cluster)
    if code:
        logs = f"{work.folder}/{job.job_id}_*_log.err"
        print(f"job {job.job_id} ended with exit code {code}: see {logs}", file=sys.stderr)
    return code
