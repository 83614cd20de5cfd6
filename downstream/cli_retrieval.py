"""Do captions find their images, and images their captions? Recall at 1, 5, 10, as on Flickr and COCO."""

from __future__ import annotations

import argparse

from downstream.options import add_encoder, hand_over


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_encoder(parser)
    parser.add_argument("shards", help="folder, glob or brace expression of tars with images and captions")


def run(args: argparse.Namespace) -> int:
    from downstream.evaluate import evaluate_retrieval
    from downstream.samples import Samples
    from downstream.weights import open_weights
    from pretrain.distributed.process import process_group

    with process_group() as process:
        weights = open_weights(
            args.checkpoint, untrained=args.untrained, weights=args.weights, device=process.device, name=args.name
        )
        if done := evaluate_retrieval(weights, Samples(args.shards)):
            hand_over(done, args.out)
    return 0
