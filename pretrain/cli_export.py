"""write a trained encoder for open_clip, timm, transformers or ONNX, verified

Example: python -m pretrain export runs/clip --to open_clip --out exports/clip

The folder holds the weights without any pickled code, what the consumer needs to load them (architecture,
preprocessing, tokenizer), and a model card, README.md, with the code that does so. Before it gets its name,
pictures and texts are embedded from it by the consumer's own classes; one row of less than cosine 0.9999 with the
run's, and there is no export. An existing folder is never touched.

  open_clip    open_clip.create_model("local-dir:DIR"): both towers and the temperature
  timm         timm.create_model("local-dir:DIR"): the image backbone
  hf           transformers' CLIPModel or SiglipModel, with preprocessing and tokenizer
  safetensors  polyview.load(DIR): our own names and the recipe's model section
  onnx         image.onnx (uint8 pixels in) and text.onnx (token ids in), unit rows out
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pretrain.weights.which import add_weights

FORMS = ("open_clip", "timm", "hf", "safetensors", "onnx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="run folder, checkpoints folder, or one checkpoint")
    parser.add_argument("--to", choices=FORMS, required=True, help="who is to load it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the export")
    add_weights(parser)
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="also verify with pictures of this folder (64 of them)"
    )
    parser.add_argument("--no-verify", action="store_true", help="write it unseen; the card says so")
    parser.add_argument(
        "--device", default="auto", help="where the run's side is computed: auto, cpu, cuda (default auto)"
    )


def run(args: argparse.Namespace) -> int:
    from pretrain.weights.export import NotVerified, export
    from pretrain.weights.source import open_source

    source = open_source(args.checkpoint, args.weights, args.device)
    try:
        proof = export(source, args.to, args.out, images=args.images, verify=not args.no_verify)
    except NotVerified as why:
        print(f"{args.out}: written, but NOT verified: {why}", file=sys.stderr)
        return 1
    print(f"{args.out}: {source.run}@{source.checkpoint.path.name}, {args.weights}, for {args.to}")
    print(f"  verified: {proof}" if proof else "  not verified")
    return 0
