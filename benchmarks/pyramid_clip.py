"""PyramidCLIP beside CLIP at equal CPU time: retrieval of held-out photographs, three seeds a method.

    POLYVIEW_DATA=… python -m benchmarks.pyramid_clip [--sets coco-mini flickr1k] [--seeds 0 1 2] [--scale S]

Both train one small ViT and text tower from the same first weights, optimizer and batch on the same photographs and
all their captions. A step of PyramidCLIP costs more, so it takes fewer: how many fit the budget of CPU seconds is
measured first, by short runs of both, and the CPU seconds that whole runs took stand beside the figures. coco-mini has
boxes and names (tags and regions), and summaries by rule; flickr1k captions alone, and summaries by the same rule. Runs
are kept under --work: a finished one is not repeated, an interrupted one is taken up again.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import parser, report
from benchmarks.kept import ENVIRONMENT, check_same, train
from pretrain.recipe import Recipe, parse_recipe

METRICS = tuple(f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10))
PROBE = (10, 40)  # steps of two short runs: their difference leaves out what a start costs
MODEL: dict[str, Any] = {
    "image": "vit_tiny_patch16_224",
    "image_size": 96,
    "image_kwargs": {"embed_dim": 128, "depth": 6, "num_heads": 4, "patch_size": 16},
    "embed_dim": 128,
    "text": {"width": 128, "layers": 2, "heads": 4, "context": 48},
    "regions": {"blocks": 2},
}
CROPS = {"flip": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "clip": {"clip": {"scale": [0.5, 1.0], **CROPS}},
    "pyramid_clip": {"pyramid_clip": CROPS},
}


class Photographs(NamedTuple):
    """A set of photographs, and what a run on it is given."""

    pack: list[list[str]]
    batch: int
    cpu_s: float


SETS = {
    "coco-mini": Photographs(
        [
            ["coco-mini", "--subdir", f"{split}2017", "--out", part]
            for split, part in (("train", "train"), ("val", "test"))
        ],
        80,
        90.0,
    ),
    "flickr1k": Photographs(
        [["flickr1k/captions.tsv", "--images", "flickr1k/images", "--holdout", "200", "--out", "."]], 100, 150.0
    ),
}


def main() -> int:
    p = parser(__doc__ or "")
    p.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--scale", type=float, default=1.0, help="of the budgets of CPU seconds")
    p.add_argument("--work", type=Path, default=Path("runs/pyramid_clip"), help="data and runs are kept here")
    args = p.parse_args()
    rows = [row for name in args.sets for row in of_set(name, args)]
    report("PyramidCLIP beside CLIP at equal CPU seconds: recall of held-out photographs", rows, args)
    return 0


def of_set(name: str, args: Any) -> list[dict[str, Any]]:
    """Rows of one set: the untrained towers, every run, then mean and spread of each method."""
    photographs, work = SETS[name], args.work / name
    prepare(photographs, work)
    budget = args.scale * photographs.cpu_s
    steps = {method: int(budget / step_cpu_s(method, photographs, work)) for method in METHODS}
    rows = [row(name, "untrained", 0, {"steps": 0, "cpu_s": 0.0, **untrained(work)})]
    for method in METHODS:
        mine = [run(method, photographs, work, seed, steps[method]) for seed in args.seeds]
        rows += [row(name, method, seed, figures) for seed, figures in zip(args.seeds, mine)]
        rows.append(row(name, method, "mean", {k: statistics.fmean(f[k] for f in mine) for k in mine[0]}))
        if len(mine) > 1:
            rows.append(row(name, method, "spread", {k: statistics.stdev(f[k] for f in mine) for k in mine[0]}))
    return rows


def row(name: str, method: str, seed: Any, figures: dict[str, float]) -> dict[str, Any]:
    return {"set": name, "run": method, "seed": seed, **figures}


def prepare(photographs: Photographs, work: Path) -> None:
    """Shards with summaries in work/train and work/test, once."""
    data = Path(os.environ.get("POLYVIEW_DATA", ""))
    if (work / "train").exists():
        return
    for packed, *options in photographs.pack:
        *options, out = (str(data / o) if o.startswith("flickr1k/") else o for o in options)
        call("pretrain", "pack", str(data / packed), *options, str(work / "plain" / out))
    for part in ("test", "train"):
        out = str(work / part)
        call("pretrain", "enrich", str(work / "plain" / part), "--out", out, "--summary", "shortest-caption")


def recipe(method: str, photographs: Photographs, work: Path, folder: Path, seed: int, steps: int) -> Recipe:
    data = {
        "name": folder.name,
        "output": str(folder),
        "world": 1,
        "seed": seed,
        "steps": steps,
        "global_batch": photographs.batch,
        "data": {"sources": [str(work / "train")], "threads": 1},
        "model": MODEL,
        "objectives": METHODS[method],
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": steps // 10},
        "checkpoint": {"every": 100, "keep_last": 1},
        "log": {"every": 20, "signals_every": steps, "tensorboard": False},
    }
    return parse_recipe(data, folder.name)


def step_cpu_s(method: str, photographs: Photographs, work: Path) -> float:
    """CPU seconds of one step."""
    seconds = []
    for steps in PROBE:
        folder = work / f"probe-{method}-{steps}"
        taken = train(folder, recipe(method, photographs, work, folder, 100, steps))
        if taken is None:
            raise SystemExit(f"{folder} was interrupted: remove it, its time is not known")
        seconds.append(taken)
    return (seconds[1] - seconds[0]) / (PROBE[1] - PROBE[0])


def run(method: str, photographs: Photographs, work: Path, seed: int, steps: int) -> dict[str, float]:
    """Steps, CPU seconds and recalls of one run."""
    folder = work / f"{method}-{seed}"
    wanted = recipe(method, photographs, work, folder, seed, steps)
    check_same(folder, wanted)
    cpu_s = train(folder, wanted)
    return {"steps": steps, "cpu_s": cpu_s or float("nan"), **recalls(work, folder, folder / "retrieval")}


def untrained(work: Path) -> dict[str, float]:
    """Recalls of first weights, those of a probe's recipe."""
    return recalls(work, work / f"probe-clip-{PROBE[0]}", work / "untrained", "--untrained")


def recalls(work: Path, trained: Path, out: Path, *options: str) -> dict[str, float]:
    if not out.exists():
        call("downstream", "retrieval", str(trained), str(work / "test"), "--out", str(out), *options)
    (file,) = out.glob("*.json")
    metrics = json.loads(file.read_text())["metrics"]
    return {name: metrics[name] for name in METRICS}


def call(*command: str) -> None:
    subprocess.run([sys.executable, "-m", *command], check=True, env=ENVIRONMENT)


if __name__ == "__main__":
    sys.exit(main())
