"""Do the objectives learn? SwAV beside lightly's, Hydra beside SupCon and beside itself without gates; CIFAR-10.

    POLYVIEW_DATA=… python -m benchmarks.learning [--runs swav lightly …] [--seeds 0 1 2] [--json PATH]
    POLYVIEW_DATA=… python -m benchmarks.learning --tune      trials on validation images; test is not looked at
    POLYVIEW_DATA=… python -m benchmarks.learning --short     a minute of SwAV beside the untrained tower

All train one small tower from the same first weights on the same 10,000 images, through the real trainer or lightly's
way, with one optimizer and schedule. Judged by kNN on frozen pooled features of 4,000 test images. lightly's SwAV is
shown after as many steps as ours, and, as its step costs more, where it was (in mid-schedule) after as many CPU
seconds. Runs are kept under --work: a finished one is not repeated, an interrupted one of ours is taken up again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.learning.settings import METHODS, TITLES, TRIAL_SHARE, TRIALS, Method

COLUMNS = (
    "steps", "cpu_s", "knn_k20", "knn_k200", "encoder_rankme", "encoder_rank", "encoder_directions",
    "projector_rankme", "projector_rank", "projector_directions",
)  # fmt: skip
UNTRAINED, AT_CPU = "untrained", "SwAV, lightly, at our CPU seconds"
Found = dict[tuple[str, Any], dict[str, Any]]
SHORT = 120  # steps


def main() -> int:
    args = arguments().parse_args()
    sys.argv[0] = "learning"  # what the JSON calls the command
    from benchmarks.learning import data, evaluation
    from benchmarks.learning.runs import Bench

    data.pack(args.work / "data")
    print(f"tower: {evaluation.megaflops():.1f} MFLOP an image of 32 pixels")
    if args.tune or args.short:
        bench = Bench(args.work, "validation")
        print_all(tune(bench, args) if args.tune else short(bench, args))
        return 0
    found = whole(Bench(args.work, "test"), args)
    title = f"kNN and spectra after training on CIFAR-10; lightly {metadata.version('lightly')}"
    report(title, rows(found), args)
    return 0


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m benchmarks.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--runs", nargs="+", choices=list(METHODS), default=list(METHODS), help="what to train")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--work", type=Path, default=Path("runs/learning"), help="data and runs are kept here")
    kind = p.add_mutually_exclusive_group()
    kind.add_argument("--tune", action="store_true", help="short trials of each run's settings on validation images")
    kind.add_argument("--short", action="store_true", help="a minute of SwAV, on validation images")
    p.add_argument("--json", type=Path, help="write the figures, versions and command here")
    return p


def tune(bench: Any, args: argparse.Namespace) -> Found:
    """Each trial's figures; one seed that the runs do not have."""
    found = {}
    for name in args.runs:
        for number, change in enumerate(TRIALS[name]):
            method = changed(METHODS[name], change)
            method = method._replace(steps=int(TRIAL_SHARE * method.steps))
            label = f"{TITLES[name]} {change}"
            found[label, 100] = bench.run(method, f"trial-{name}-{number}", 100)
            print_all({(label, 100): found[label, 100]})
    return found


def changed(method: Method, change: dict[str, Any]) -> Method:
    """`method` with another lr, or other options of its objective."""
    options = {k: v for k, v in change.items() if k != "lr"}
    return method._replace(lr=change.get("lr", method.lr), options=method.options | options)


def short(bench: Any, args: argparse.Namespace) -> Found:
    found: Found = {}
    for seed in args.seeds:
        found[UNTRAINED, seed] = bench.untrained(seed)
        found[TITLES["swav"], seed] = bench.run(METHODS["swav"]._replace(steps=SHORT), "short", seed)
    return found


def whole(bench: Any, args: argparse.Namespace) -> Found:
    """Every run's figures, by what it is called and seed."""
    found: Found = {(UNTRAINED, seed): bench.untrained(seed) for seed in args.seeds}
    for seed in args.seeds:
        for name in args.runs:
            found[TITLES[name], seed] = bench.run(METHODS[name], name, seed)
            print_all({(TITLES[name], seed): found[TITLES[name], seed]})
    for seed in args.seeds:
        ours = found.get((TITLES["swav"], seed), {}).get("cpu_s")
        if ours and "lightly" in args.runs:
            found[AT_CPU, seed] = bench.until(METHODS["lightly"], "lightly", seed, ours)
    return found


def rows(found: Found) -> list[dict[str, Any]]:
    """Every run, then mean and spread (standard deviation over seeds) of each kind."""
    every = [row(what, seed, figures) for (what, seed), figures in found.items()]
    for what in dict.fromkeys(what for what, _ in found):
        mine = [figures for (name, _), figures in found.items() if name == what]
        every.append(row(what, "mean", combined(mine, statistics.fmean)))
        if len(mine) > 1:
            every.append(row(what, "spread", combined(mine, statistics.stdev)))
    return every


def row(what: str, seed: Any, figures: dict[str, Any]) -> dict[str, Any]:
    return {"run": what, "seed": seed, **{c: figures.get(c) for c in COLUMNS}}


def combined(mine: list[dict[str, Any]], how: Any) -> dict[str, Any]:
    """Of the figures that all have."""
    return {c: float(how([f[c] for f in mine])) for c in COLUMNS if all(f.get(c) is not None for f in mine)}


def print_all(found: Found) -> None:
    for (what, seed), figures in found.items():
        shown = "  ".join(f"{k} {v:.4g}" for k, v in figures.items() if v is not None)
        print(f"{what}, seed {seed}: {shown}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
