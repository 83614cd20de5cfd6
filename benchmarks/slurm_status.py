"""`slurm status` over many runs, in a process of its own, beside `squeue` alone.

Each run has a log of some thousand lines, checkpoints, heartbeats and a held job in the queue. Where no Slurm answers
the same is measured without the jobs; a cluster to try: `python -m tests.cluster up FOLDER`.

    python -m benchmarks.slurm_status --runs 200
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import parser, report
from pretrain.errors import UserError
from slurm import queue, records

FIGURES = (
    "loss/clip", "lr", "data_wait", "memory_gib", "grad_norm", "tflops", "mfu", "phase/data", "phase/forward",
    "phase/backward", "phase/update", "rankme", "embedding_std", "temperature", "clip/accuracy",
)  # fmt: skip
RANKS = 8


def write_run(run: Path, lines: int) -> None:
    """A run in its middle: what status reads, as long as in a real one."""
    for folder in ("heartbeat", "slurm", *(f"checkpoints/step_{step:08d}" for step in (lines - 1000, lines - 500))):
        (run / folder).mkdir(parents=True)
    (run / "recipe.yaml").write_text(f"name: {run.name}\noutput: {run}\nsteps: {10 * lines}\n" + "# a line\n" * 150)
    now = time.time()
    with (run / "log.jsonl").open("w") as log:
        log.write(json.dumps({"event": "start", "time": now, "step": 0, "total_steps": 10 * lines}) + "\n")
        for step in range(1, lines + 1):
            figures = {name: step / (3 + i) for i, name in enumerate(FIGURES)}
            line = {"step": step, "time": now + step, "samples_seen": step * 4096, "epoch": 0, "loss": 1 / step}
            log.write(json.dumps(line | {"images_per_s": 4096.0, "step_s": 1.0} | figures) + "\n")
    start = {
        "host": "n1",
        "world": RANKS,
        "date": "2026-01-01T00:00:00+00:00",
        "versions": {f"p{i}": "1.0" for i in range(15)},
    }
    (run / "run.json").write_text(json.dumps([start] * 3, indent=1))
    for manifest in run.glob("checkpoints/*"):
        (manifest / "manifest.json").write_text("{}")
    for rank in range(RANKS):
        sign = {"rank": rank, "host": "n1", "step": lines, "phase": "data", "since": 0.1, "time": now, "every_s": 10}
        (run / f"heartbeat/rank_{rank:05d}.json").write_text(json.dumps(sign))
    for restart in range(3):
        records.append(run / "slurm", "began", job="1", restart=restart, nodes=["n1", "n2"], silent=[])
        records.append(run / "slurm", "ended", job="1", restart=restart, how="requeued")


def hold(run: Path) -> str:
    """A held job of `run`."""
    comment = f"--comment={queue.ABOUT}{run}"
    held = ["sbatch", "--parsable", "--hold", comment, f"--job-name={run.name}", "--output=/dev/null", "--wrap=true"]
    job = queue.ask(*held).strip()
    (run / "slurm/recipe-0.yaml").touch()
    records.append(run / "slurm", "submitted", job=job, name=run.name, nodes=2, ranks_per_node=4, cluster="slurm")
    return job


def timed(argv: list[str], rounds: int) -> tuple[float, float]:
    """Median wall and CPU seconds of a command, the command's children included."""
    walls, cpus = [], []
    for _ in range(rounds + 1):  # the first warms up
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        walls.append(time.perf_counter() - begin)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(walls[1:]), statistics.median(cpus[1:])


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--runs", type=int, default=200)
    p.add_argument("--lines", type=int, default=3000, help="of each log")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, jobs = Path(temporary), list[str]()
        runs = [folder / "runs" / f"run-{i:03d}" for i in range(args.runs)]
        for run in runs:
            write_run(run, args.lines)
        commands = {
            "python alone": [sys.executable, "-c", "pass"],
            "status": [sys.executable, "-m", "slurm", "status", str(folder / "runs")],
            "status of one": [sys.executable, "-m", "slurm", "status", str(runs[0])],
        }
        try:
            queue.queued()
        except UserError as error:
            print(f"without jobs: {error}", file=sys.stderr)
            os.environ["PATH"] = os.path.dirname(sys.executable)
        else:
            jobs += map(hold, runs)
            commands["squeue alone"] = ["squeue", "--me"]
        try:
            rows = []
            for name, argv in commands.items():
                wall, cpu = timed(argv, args.rounds)
                rows.append({"what": name, "runs": args.runs, "jobs": len(jobs), "wall_s": wall, "cpu_s": cpu})
        finally:
            if jobs:
                queue.ask("scancel", *jobs)
        report(f"status of {args.runs} runs, logs of {args.lines:,} lines", rows, args)


if __name__ == "__main__":
    main()
