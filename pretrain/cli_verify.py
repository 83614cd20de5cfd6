"""check every shard: cut or damaged tars, repeated keys, empty or (with --decode) undecodable images

Prints each problem with shard, key and reason. Exit code 1 when there is any, 0 when all is well.
"""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="folders, tars, globs, or a-{000..009}.tar")
    parser.add_argument("--decode", action="store_true", help="read every byte: decode images, check captions")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: all cores)")
    parser.add_argument("--show", type=int, default=50, metavar="N", help="problems printed at most (0: all)")


def decode_image(data: bytes) -> np.ndarray:
    """Pixels as the trainer makes them, or BadImage."""
    from pretrain.shards.images import BadImage
    from pretrain.views.decode import DamagedSample, decode

    try:
        return decode(data)
    except DamagedSample as damaged:
        raise BadImage("unreadable image", damaged.reason) from damaged


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import track

    from pretrain.shards.source import expand_shards
    from pretrain.shards.verify import verify_shards

    expected = {shard.path: shard.samples for shard in expand_shards(args.shards)}
    shards = list(expected)
    reports = verify_shards(shards, decode_image if args.decode else None, expected, args.workers)
    done = list(track(reports, "verifying", total=len(shards), console=Console(stderr=True), transient=True))
    place = {shard: i for i, shard in enumerate(shards)}
    done.sort(key=lambda report: place[report.shard])
    problems = [problem for report in done for problem in report.problems]
    for problem in itertools.islice(problems, args.show or None):
        print(f"{problem.shard}\t{problem.key or '-'}\t{problem.reason}")
    if args.show and len(problems) > args.show:
        print(f"… and {len(problems) - args.show} more (--show 0 prints all)")
    damaged = sum(bool(report.problems) for report in done)
    samples = sum(report.samples for report in done)
    print(f"{samples:,} samples in {len(done):,} shards: {_verdict(damaged, len(problems))}")
    return 1 if problems else 0


def _verdict(damaged: int, problems: int) -> str:
    return f"{problems} problem(s) in {damaged} shard(s)" if problems else "all is well"
