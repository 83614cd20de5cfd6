"""Which class do an image's nearest labelled images have? Weighted kNN by DINO's and by Wu's protocol."""

from __future__ import annotations

import argparse

from downstream.options import add_encoder, hand_over


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_encoder(parser)
    parser.add_argument("--train", required=True, metavar="SHARDS", help="labelled images that vote")
    parser.add_argument("--test", required=True, metavar="SHARDS", help="labelled images to classify")
    parser.add_argument(
        "--features",
        choices=("pooled", "embedding"),
        default="pooled",
        help="pooled: the backbone's, as the published protocols; embedding: after the projection",
    )


def run(args: argparse.Namespace) -> int:
    from downstream.evaluate import evaluate_knn
    from downstream.samples import Samples
    from downstream.weights import open_weights
    from pretrain.distributed.process import process_group

    with process_group() as process:
        weights = open_weights(
            args.checkpoint, untrained=args.untrained, weights=args.weights, device=process.device, name=args.name
        )
        if done := evaluate_knn(weights, Samples(args.train), Samples(args.test), output=args.features):
            hand_over(done, args.out)
    return 0
