"""Rebuild the exact batch, crops and per-sample losses of any step of a run, as a page of pictures."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--step", type=int, required=True, help="the step as the log counts: 1 is the first")
    parser.add_argument("--out", type=Path, help="page to write (default RUN/replay_STEP.html)")
    parser.add_argument(
        "--advance",
        action="store_true",
        help="train from the newest checkpoint before the step up to it, here, instead of scoring with that checkpoint",
    )
    parser.add_argument("--top", type=int, default=64, help="samples on the page, highest loss first (default 64)")


def run(args: argparse.Namespace) -> int:
    from pretrain.replay import replay, write_page

    replayed = replay(args.run, args.step, advance=args.advance)
    out = args.out or args.run / f"replay_{args.step}.html"
    write_page(replayed, out, args.top)
    print(replayed.summary(top=5))
    print(f"page: {out}")
    return 0
