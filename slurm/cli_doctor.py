"""What is wrong here for polyview: with this machine, with the site's Slurm, and with --nodes N on its nodes.

--nodes runs a short job there, asking for what training would: whether ranks meet, files and locks are shared, versions
are the same, GPUs are seen, a job can put itself back into the queue. Ends with 1 where there is a problem.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from slurm.options import add_resources

    add_resources(parser)
    parser.set_defaults(nodes=None)  # none: no job is run
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    from pretrain import cli_doctor
    from pretrain.errors import UserError
    from slurm.doctor import examine, judge, run_probe
    from slurm.options import resources_of, site
    from slurm.profile import load_profile

    facts, problems = cli_doctor.facts(), cli_doctor.problems()
    if shutil.which("sbatch") is None:
        if args.nodes or args.profile:
            raise UserError("no sbatch on this machine: log in to the cluster")
        return cli_doctor.tell(facts, problems, as_json=args.json)
    profile = site(args, load_profile(args.profile))
    asked = argparse.Namespace(**vars(args) | {"nodes": args.nodes or "1"})
    resources = resources_of(asked, profile, None)
    more, wrong = examine(profile, resources.nodes)
    facts |= more
    problems += wrong
    if args.nodes and more:  # the controller answers
        found = run_probe(profile, resources, Path.cwd(), lambda told: print(told, file=sys.stderr, flush=True))
        facts["nodes"] = ", ".join(dict.fromkeys(report["host"] for report in found))
        problems += judge(found, resources, profile.offline)
    return cli_doctor.tell(facts, problems, as_json=args.json)
