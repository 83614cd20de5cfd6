"""How long a save holds the training step, beside a synchronous torch.save of the same bytes.

    python -m benchmarks.checkpoint --mb 400

The state is a model's worth of fp32 tensors on the CPU; training would go on changing them, so ours copies
them to host memory before it returns, and that copy is what holds the step. Rounds are interleaved; each save
begins with the disk's caches flushed and nothing else being written. Seconds are the calling thread's: wall
(what the step waits for) and CPU (for machines that are shared). The peer is torch.save at its best case, no
fsync; with fsync it promises what ours does.

"bare copy" is the state copied to warm memory and nothing else: no save that lets training go on at once can hold it
for less. "steady" is any save but the first; "steady, URL" is one to an object store (`--to`; by default in this
process's memory), which is sent once the step goes on; "first" is a run's first, after
`CheckpointWriter.reserve`; "first, cold" is without it, and pays for touching new memory. "written" is until the
commit, fsync and checksums included: the thread's time, which training does not wait for.
"""

from __future__ import annotations

import argparse
import os
import shutil
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


class Timed:
    """Wall and CPU seconds of the calling thread, by what was timed."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[tuple[float, float]]] = {}

    def __call__(self, name: str, fn: Callable[[], object]) -> None:
        os.sync()
        wall, cpu = time.perf_counter(), time.thread_time()
        fn()
        now = (time.perf_counter() - wall, time.thread_time() - cpu)
        self.seconds.setdefault(name, []).append(now)

    def rows(self, peer: str) -> list[dict]:
        medians = {n: [statistics.median(t) for t in zip(*s, strict=True)] for n, s in self.seconds.items()}
        return [
            {
                "save": name,
                "wall s": wall,
                "best wall s": min(self.seconds[name])[0],
                "CPU s": cpu,
                "of torch.save (wall)": wall / medians[peer][0],
                "of torch.save (CPU)": cpu / medians[peer][1],
                "bar": BAR if name in ("steady", "steady, URL", "first") else "",
            }
            for name, (wall, cpu) in medians.items()
        ]


def durable_peer(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(state, path)
    with path.open("rb") as file:
        os.fsync(file)


def first_save(timed: Timed, name: str, root: Path, fragments: list[Fragment], *, reserve: bool) -> None:
    writer = CheckpointWriter(root, attempt=new_attempt())
    if reserve:
        writer.reserve(fragments)
        writer.wait()
    timed(name, lambda: writer.save(1, fragments, {}))
    writer.wait()
    shutil.rmtree(root)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    state = make_state(args.mb)
    fragments = slice_for_rank(state, 0, 1)
    timed = Timed()
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        root = Path(scratch)
        writer = CheckpointWriter(root / "steady", attempt=new_attempt(), keep_last=1)
        stored = CheckpointWriter(args.to, attempt=new_attempt(), keep_last=1)

        def whole_save(step: int) -> None:
            writer.save(step, fragments, {})
            writer.wait()

        whole_save(0)
        stored.save(0, fragments, {})
        stored.wait()
        torch.save(state, root / "peer.pt")  # a warm-up for both
        host = {name: tensor.clone() for name, tensor in state.items()}
        for step in range(1, 2 * args.rounds, 2):
            timed("torch.save", lambda: torch.save(state, root / "peer.pt"))
            timed("torch.save + fsync", lambda: durable_peer(state, root / "peer.pt"))
            timed("bare copy", lambda: [host[name].copy_(tensor) for name, tensor in state.items()])
            timed("steady", lambda: writer.save(step, fragments, {}))  # noqa: B023
            writer.wait()
            timed("steady, URL", lambda: stored.save(step, fragments, {}))  # noqa: B023
            stored.wait()
            timed("written", lambda: whole_save(step + 1))  # noqa: B023
            first_save(timed, "first", root / "first", fragments, reserve=True)
            first_save(timed, "first, cold", root / "cold", fragments, reserve=False)
    report(
        f"time a save of {args.mb} MB holds the step ({args.threads} thread(s))",
        timed.rows("torch.save"),
        args,
    )


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--mb", type=int, default=400, help="size of the state in MB")
    p.add_argument("--threads", type=int, default=1, help="torch's intra-op threads")
    p.add_argument("--to", default="memory://checkpoints", help="URL of the object store")
    p.add_argument("--dir", type=Path, help="where to write (default: the system's temporary folder)")
    main(p.parse_args())
