"""How long a save holds the training step, beside a synchronous torch.save of the same bytes.

    python -m benchmarks.checkpoint --mb 400

The state is a model's worth of fp32 tensors on the CPU; training would go on changing them, so ours copies
them to host memory before it returns, and that copy is what holds the step. Rounds are interleaved and
wall-clock seconds of the calling thread are taken (what the step waits for), with nothing else being written
at the time: between rounds the writer's thread is waited for, outside the measurement. torch.save is given
its best case: no fsync. "reserved" is the first save of a run after `reserve`, "cold" one without.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import parser, report
from pretrain.checkpoint import CheckpointWriter, Fragment, new_attempt, slice_for_rank

BAR = 0.10  # of torch.save's time


def make_state(mb: int, tensors: int = 300) -> dict[str, torch.Tensor]:
    """Parameters and two Adam moments of uneven sizes, `mb` MB in all."""
    elements = mb * 1_000_000 // 4
    weights = torch.arange(1, tensors + 1, dtype=torch.float64)
    sizes = (weights / weights.sum() * elements).long().tolist()
    return {f"model.block{i}.weight": torch.randn(n) for i, n in enumerate(sizes)}


def seconds(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def first_save(folder: Path, fragments: list[Fragment], *, reserve: bool) -> float:
    writer = CheckpointWriter(folder, attempt=new_attempt(), keep_last=1)
    if reserve:
        writer.reserve(fragments)
        writer.wait()
    held = seconds(lambda: writer.save(1, fragments, {}))
    writer.wait()
    return held


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    state = make_state(args.mb)
    fragments = slice_for_rank(state, 0, 1)
    times: dict[str, list[float]] = {
        k: [] for k in ("torch.save", "ours", "ours, reserved", "ours, cold", "written")
    }
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        root = Path(scratch)
        writer = CheckpointWriter(root / "steady", attempt=new_attempt(), keep_last=1)
        writer.save(0, fragments, {})
        writer.wait()
        for step in range(1, args.rounds + 1):
            times["torch.save"].append(seconds(lambda: torch.save(state, root / "peer.pt")))
            start = time.perf_counter()
            writer.save(step, fragments, {"step": step})
            times["ours"].append(time.perf_counter() - start)
            writer.wait()
            times["written"].append(time.perf_counter() - start)
            times["ours, reserved"].append(first_save(root / f"r{step}", fragments, reserve=True))
            times["ours, cold"].append(first_save(root / f"c{step}", fragments, reserve=False))
    median = {name: statistics.median(t) for name, t in times.items()}
    peer = median["torch.save"]
    report(
        f"time a save of {args.mb} MB holds the step (wall s, {args.threads} thread(s))",
        [
            {
                "save": name,
                "seconds": s,
                "of torch.save": s / peer,
                "bar": BAR if name.startswith("ours") else "",
            }
            for name, s in median.items()
        ],
        args,
    )


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--mb", type=int, default=400, help="size of the state in MB")
    p.add_argument("--threads", type=int, default=1, help="torch's intra-op threads")
    p.add_argument("--dir", type=Path, help="where to write (default: the system's temporary folder)")
    main(p.parse_args())
