"""How many directions do the features use? Singular values of encoder and projector, beside controls."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from downstream.options import add_encoder, hand_over


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_encoder(parser)
    parser.add_argument("shards", metavar="SHARDS", help="images; ten for every dimension of the features are wanted")
    parser.add_argument(
        "--control", type=Path, action="append", default=[], metavar="RUN",
        help="another run to draw beside it (may be repeated)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from downstream.heads import open_projector
    from downstream.report.page import write_alone
    from downstream.samples import Samples
    from downstream.spectrum import evaluate_spectrum
    from downstream.weights import open_weights
    from pretrain.distributed.process import process_group

    with process_group() as process:
        samples, found = Samples(args.shards), []
        names: set[str] = set()
        first: dict[str, Any] = {"untrained": args.untrained, "weights": args.weights, "name": args.name}
        wanted: list[tuple[Path, dict[str, Any]]] = [(args.checkpoint, first), *((path, {}) for path in args.control)]
        for path, which in wanted:
            weights = open_weights(path, device=process.device, **which)
            if weights.name in names:  # two runs of one name: told apart by their folders
                weights.name = f"{weights.name} of {path.resolve().name}"
            names.add(weights.name)
            found.append(evaluate_spectrum(weights, open_projector(weights, path), samples))
        done = [evaluation for evaluation in found if evaluation is not None]
        for evaluation in done:
            hand_over(evaluation, args.out)
        if done:
            print(f"  -> {write_alone([(e.result, e.pictures) for e in done], args.out)}")
    return 0
