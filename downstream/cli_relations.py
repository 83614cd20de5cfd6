"""Which classes does a Hydra run hold to be alike? Relations and openness of its gates, as pairs and a matrix."""

from __future__ import annotations

import argparse
from pathlib import Path

from downstream.options import add_encoder, hand_over


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_encoder(parser)
    parser.add_argument("--top", type=int, default=50, metavar="N", help="pairs to list of each kind (default: 50)")
    parser.add_argument(
        "--classnames", type=Path, metavar="FILE", help="names of classes 0, 1, …: one a line (default: numbers)"
    )


def run(args: argparse.Namespace) -> int:
    from downstream.class_relations import evaluate_relations
    from downstream.heads import open_gates
    from downstream.report.page import write_alone
    from downstream.weights import open_weights
    from downstream.zeroshot import read_lines
    from pretrain.errors import UserError

    if args.top < 1:
        raise UserError(f"--top {args.top}: at least 1 pair must be listed")
    names = read_lines(args.classnames) if args.classnames else []
    weights = open_weights(args.checkpoint, untrained=args.untrained, weights=args.weights, name=args.name)
    done = evaluate_relations(weights, open_gates(weights, args.checkpoint), names, top=args.top)
    hand_over(done, args.out)
    print(f"  -> {write_alone([(done.result, done.pictures)], args.out)}")
    return 0
