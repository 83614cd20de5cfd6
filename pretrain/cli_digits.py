"""Make the demo's data: captioned scenes of handwritten digits, unseen digits apart for testing."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder; OUT/train and OUT/test are written")
    parser.add_argument("--train", type=int, default=8000, help="training scenes (default 8000)")
    parser.add_argument("--test", type=int, default=1000, help="test scenes (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="other scenes for another seed (default 0)")
    parser.add_argument(
        "--shuffle-captions", action="store_true", help="a control: training scenes get the captions of others"
    )


def run(args: argparse.Namespace) -> int:
    from pretrain.shards.digits import write_digits

    options = {"train": args.train, "test": args.test, "seed": args.seed, "shuffle_captions": args.shuffle_captions}
    for packed in write_digits(args.out, **options):
        size = f"{packed.bytes / 1e6:.1f} MB"
        print(f"{packed.folder}: {packed.samples:,} scenes in {packed.shards} shard(s), {size}")
    return 0
