"""What every benchmark shares: interleaved rounds, CPU seconds, one table, one JSON."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata as metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "deepspeed",
    "open_clip_torch",
    "webdataset",
    "faiss-cpu",
    "faiss-gpu",
    "numpy",
)


def parser(doc: str, rounds: bool = True) -> argparse.ArgumentParser:
    """A parser whose `--json PATH` keeps the figures; `rounds`: something is timed."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds:
        p.add_argument("--rounds", type=int, default=5, help="interleaved rounds; the median is reported")
    p.add_argument("--json", type=Path, help="write the figures, versions and command here")
    return p


def measure(
    fns: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median seconds of each function over `rounds` rounds in turn (A B C A B C …), after one warm-up of each."""
    for fn in fns.values():
        fn()
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            start = clock()
            fn()
            seconds[name].append(clock() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def clock(device: str) -> Callable[[], float]:
    """CPU seconds, or on a GPU wall seconds of finished work."""
    if device == "cpu":
        return time.process_time

    def finished() -> float:
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    return finished


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def report(title: str, rows: list[dict], args: argparse.Namespace) -> None:
    """Print `rows` (dicts of the same keys) as a table; with --json, keep them with versions, date and command."""
    columns = list(rows[0])
    cells = [[f"{r[c]:.4g}" if isinstance(r[c], float) else str(r[c]) for c in columns] for r in rows]
    widths = [max(len(c), *(len(row[i]) for row in cells)) for i, c in enumerate(columns)]
    print(title)
    for row in [columns, *cells]:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths)))
    if args.json:
        record = {
            "title": title,
            "date": datetime.date.today().isoformat(),
            "command": "python -m benchmarks." + " ".join([Path(sys.argv[0]).stem, *sys.argv[1:]]),
            "machine": platform.processor() or platform.machine(),
            "versions": versions(),
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
