"""Submit a recipe as a job through submitit; a job that is requeued resumes its run."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optimizer.lr=1e-3")
    parser.add_argument("--nodes", type=int, default=1, help="nodes (default 1)")
    parser.add_argument("--ranks-per-node", type=int, help="ranks a node, one a GPU (default: the recipe's world)")
    parser.add_argument("--gpus-per-node", type=int, default=0, help="GPUs a node (default 0)")
    parser.add_argument("--cpus-per-rank", type=int, default=4, help="cores a rank (default 4)")
    parser.add_argument("--minutes", type=int, default=60, help="time limit (default 60)")
    parser.add_argument("--partition", help="Slurm partition")
    parser.add_argument("--account", help="Slurm account")
    parser.add_argument("--local", action="store_true", help="run the very same job on this machine, without Slurm")
    parser.add_argument("--wait", action="store_true", help="wait for the job; exit code 2 when it failed")


def run(args: argparse.Namespace) -> int:
    from pretrain.errors import UserError
    from pretrain.recipe import load_recipe
    from slurm.submit import Resources, submit

    recipe = load_recipe(args.recipe, args.overrides)
    ranks_per_node = args.ranks_per_node
    if ranks_per_node is None:
        ranks_per_node = max(1, (recipe.world or 1) // max(1, args.nodes))
    resources = Resources(
        nodes=args.nodes,
        ranks_per_node=ranks_per_node,
        gpus_per_node=args.gpus_per_node,
        cpus_per_rank=args.cpus_per_rank,
        minutes=args.minutes,
        partition=args.partition,
        account=args.account,
    )
    job = submit(recipe, resources, cluster="local" if args.local else "slurm")
    print(f"job {job.job_id}: {recipe.name} on {args.nodes} x {ranks_per_node} ranks; logs in {job.paths.folder}")
    if args.wait and job.exception():
        raise UserError(f"job {job.job_id} failed: see {job.paths.folder}/{job.job_id}_*_log.err")
    return 0
