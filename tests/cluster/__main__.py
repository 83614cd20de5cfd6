"""Bring a cluster up to try polyview on it, and down again: ``python -m tests.cluster up FOLDER``, ``down FOLDER``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pretrain.errors import UserError
from tests.cluster.cluster import Cluster


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("action", choices=["up", "down"])
    parser.add_argument("folder", type=Path, help="all that the cluster writes is there")
    parser.add_argument("--nodes", type=int, default=3, help="nodes (default 3)")
    parser.add_argument("--cpus", type=int, default=4, help="cores that a node claims to have (default 4)")
    parser.add_argument("--gpus", type=int, default=2, help="GPUs that a node claims to have (default 2)")
    args = parser.parse_args()
    cluster = Cluster(args.folder, args.nodes, args.cpus, args.gpus, bound=False)
    try:
        if args.action == "up":
            cluster.up()
        elif not (args.folder / "run").is_dir():
            raise UserError(f"{args.folder} holds no cluster: name the folder that `up` was given")
        else:
            cluster.down()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if args.action == "up":
        print("\n".join(f"export {name}={value}" for name, value in cluster.env.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
