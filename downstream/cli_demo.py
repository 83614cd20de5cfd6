"""The whole way on embedded data: shards, CLIP and SwAV on two processes, index, evaluation, one report."""

from __future__ import annotations

import argparse
import importlib.resources
import shutil
import subprocess
import sys
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to work in (default demo/)")
    parser.add_argument("--steps", type=int, help="train fewer or more steps than the recipe's")
    parser.add_argument("--keep", action="store_true", help="go on in an existing folder instead of starting anew")


def run(args: argparse.Namespace) -> int:
    start = time.monotonic()
    if args.out.exists() and not args.keep:
        _remove_demo(args.out)
    for command in commands(args.out, args.steps):
        print(f"\n[{time.monotonic() - start:4.0f} s] $ python -m {' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, "-m", *command])
        if done.returncode:
            return done.returncode
    print(f"\n[{time.monotonic() - start:4.0f} s] open {args.out / 'report.html'}")
    return 0


def commands(out: Path, steps: int | None) -> list[list[str]]:
    """Every command of the demo, as one would type it; they work the same on photographs and captions of one's own."""
    train, test, run, collection = (str(out / p) for p in ("digits/train", "digits/test", "run", "collection"))
    results = str(out / "results")
    # CLIP alone, three seeds, trained on captions of other scenes, measured once (`make control`)
    control = str(importlib.resources.files("recipes") / "demo_control")
    training = ["pretrain", "demo", f"output={run}", f"data.sources.0.shards={train}"]
    return [
        ["pretrain", "digits", str(out / "digits")],
        training if steps is None else [*training, f"steps={steps}"],
        ["index", "embed", run, test, "--out", str(out / "embeddings")],
        ["index", "build", collection, "--from", str(out / "embeddings")],
        ["index", "publish", collection],
        [
            "index",
            "search",
            collection,
            "--text",
            "a seven in the top left",
            "-k",
            "5",
            "--html",
            str(out / "search.html"),
        ],
        *(["downstream", "retrieval", run, test, "--out", results, *u] for u in ([], ["--untrained"])),
        *(
            ["downstream", "knn", run, "--train", train, "--test", test, "--out", results, *u]
            for u in ([], ["--untrained"])
        ),
        *(["downstream", "zeroshot", run, test, "--out", results, *u] for u in ([], ["--untrained"])),
        ["downstream", "report", run, "--results", results, control, "--out", str(out / "report.html")],
    ]


def _remove_demo(out: Path) -> None:
    # only what a demo made: a folder of someone's own is never emptied
    for name in ("digits", "run", "embeddings", "collection", "results"):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
