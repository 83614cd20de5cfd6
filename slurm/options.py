"""The flags that say where a job runs and what it asks for: the same for every command that sends one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pretrain.errors import UserError

if TYPE_CHECKING:  # `--help` answers at once
    from slurm.profile import Profile
    from slurm.work import Resources


def add_resources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", help="the site's profile: a YAML file, or a name (default: $POLYVIEW_PROFILE)")
    parser.add_argument("--nodes", default="1", metavar="N|N-M", help="nodes, or the least and the most (default 1)")
    parser.add_argument("--ranks-per-node", type=int, help="ranks a node (default: one a GPU, else the recipe's world)")
    parser.add_argument("--gpus-per-node", type=int, help="GPUs a node (default: the profile's, else none)")
    parser.add_argument("--cpus-per-rank", type=int, help="cores a rank (default: the profile's, else 4)")
    parser.add_argument("--minutes", type=int, help="time limit (default: the profile's, else 60)")
    parser.add_argument("--partition", help="Slurm partition (default: the profile's)")
    parser.add_argument("--account", help="Slurm account (default: the profile's)")
    parser.add_argument("--qos", help="quality of service (default: the profile's)")
    parser.add_argument("--exclude", help="nodes not to run on, such as n[3,7-9], beside the profile's")
    parser.add_argument("--max-restarts", type=int, help="times it goes back into the queue (default: the profile's)")


def site(args: argparse.Namespace, profile: Profile) -> Profile:
    """`profile` with what the command line says of the site."""
    from slurm.profile import Profile

    said = {
        name: value
        for name in ("partition", "account", "qos", "minutes", "cpus_per_rank", "gpus_per_node", "max_restarts")
        if (value := getattr(args, name)) is not None
    }
    if args.exclude:
        said["exclude"] = ",".join(filter(None, (profile.exclude, args.exclude)))
    return Profile.model_validate(profile.model_dump() | said)


def resources_of(args: argparse.Namespace, profile: Profile, world: int | None) -> Resources:
    """What a training job asks for; `profile` as `site` gives it, world: the recipe's.

    Raises:
        UserError: the flags make no job.
    """
    from slurm.work import Resources

    least, most = _nodes(args.nodes)
    gpus = profile.gpus_per_node or 0
    ranks = args.ranks_per_node
    if ranks is None:
        ranks = profile.ranks_per_node or gpus or max(1, (world or 1) // least)
    if ranks < 1:
        raise UserError(f"--nodes {args.nodes} x --ranks-per-node {ranks} is no rank at all")
    return Resources(least, ranks, gpus, profile.cpus_per_rank, profile.minutes, most_nodes=most)


def _nodes(asked: str) -> tuple[int, int | None]:
    least, dash, most = asked.partition("-")
    if not least.isdigit() or (dash and not most.isdigit()) or int(least) < 1 or (dash and int(most) < int(least)):
        raise UserError(f"--nodes {asked}: give a number, or the least and the most, such as 2-4")
    return int(least), int(most) if dash and int(most) > int(least) else None
