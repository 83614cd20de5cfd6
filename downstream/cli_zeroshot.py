"""Which class name lies nearest to an image? Zero-shot accuracy with prompt templates."""

from __future__ import annotations

import argparse
from pathlib import Path

from downstream.options import add_encoder, hand_over


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_encoder(parser)
    parser.add_argument("shards", help="folder, glob or brace expression of tars with images and classes")
    parser.add_argument(
        "--classnames", type=Path, help="one name a line, line = class (default: classnames.txt of the data)"
    )
    parser.add_argument(
        "--templates",
        type=Path,
        help="one a line with {c} for the name (default: the data's zeroshot_classification_templates.txt, "
        "else 'a photo of a {c}.')",
    )


def run(args: argparse.Namespace) -> int:
    from downstream.evaluate import evaluate_zeroshot
    from downstream.samples import Samples
    from downstream.weights import open_weights
    from downstream.zeroshot import names_and_templates
    from pretrain.distributed.process import process_group

    samples = Samples(args.shards)
    classnames, templates = names_and_templates(samples, args.classnames, args.templates)
    with process_group() as process:
        weights = open_weights(
            args.checkpoint, untrained=args.untrained, weights=args.weights, device=process.device, name=args.name
        )
        if done := evaluate_zeroshot(weights, samples, classnames, templates):
            hand_over(done, args.out)
    return 0
