"""What `slurm submit` adds to sbatch: from the command to a running job, on a real Slurm of three nodes made here.

    python -m benchmarks.slurm_submit --rounds 5

As root, with Debian's Slurm (see `tests/cluster`). Both jobs ask for the same; rounds are interleaved, and each begins
with an empty cluster. Seconds are wall clock, from the start of the command in a fresh process until squeue says
RUNNING; the job itself is cancelled then.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import parser, report
from tests.cluster.cluster import Cluster
from tests.tiny import recipe_data, write_recipe, write_shards

BAR_S = 5.0


def seconds_until_running(cluster: Cluster, argv: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    cluster.wait_for(lambda: "RUNNING" in cluster.run("squeue", "-h", "-o", "%T"), 60, "a running job")
    took = time.perf_counter() - begun
    cluster.cancel_all()
    return took


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch, Cluster(Path(scratch) / "slurm") as cluster:
        os.environ.update(cluster.env)
        folder = Path(scratch)
        data = recipe_data(write_shards(folder / "shards"), folder / "run", steps=10_000)
        recipe = str(write_recipe(folder / "recipe.yaml", data))
        asked = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--output=/dev/null"]
        commands = {
            "sbatch": ["sbatch", *asked, "--wrap=srun sleep 600"],
            "slurm submit": [sys.executable, "-m", "slurm", "submit", recipe, "--nodes=2", "--cpus-per-rank=1"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, argv in commands.items():
                seconds[name].append(seconds_until_running(cluster, argv))
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    rows = [
        {"command": name, "s to running": s, "added s": s - medians["sbatch"], "bar": BAR_S if name != "sbatch" else ""}
        for name, s in medians.items()
    ]
    report("from the command to a running job", rows, args)


if __name__ == "__main__":
    p = parser(__doc__)
    p.set_defaults(rounds=5)
    main(p.parse_args())
