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
    from downstream.zeroshot import PLAIN, check_templates, read_lines
    from pretrain.distributed.process import process_group
    from pretrain.errors import UserError

    samples = Samples(args.shards)
    names = args.classnames or samples.beside("classnames.txt")
    if names is None:
        raise UserError(f"{args.shards}: no classnames.txt there; name a file with --classnames")
    forms = args.templates or samples.beside("zeroshot_classification_templates.txt")
    templates = read_lines(forms) if forms else PLAIN
    check_templates(templates, str(forms))
    with process_group() as process:
        weights = open_weights(
            args.checkpoint, untrained=args.untrained, weights=args.weights, device=process.device, name=args.name
        )
        if done := evaluate_zeroshot(weights, samples, read_lines(names), templates):
            hand_over(done, args.out)
    return 0
