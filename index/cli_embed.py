"""embed the images and captions of shards with a trained encoder

Example: python -m index embed runs/clip data/flickr --out embeddings/flickr

One unit a tar, written whole or not at all: run the same command again and it goes on where it stopped. Under
torchrun, accelerate or srun each process takes its share of the tars.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.weights.which import add_weights

if TYPE_CHECKING:
    from index.embed.job import Counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="run folder, checkpoints folder, or one checkpoint")
    parser.add_argument("shards", nargs="+", help="folder of tars, glob, brace expression, or tars")
    parser.add_argument("--out", type=Path, required=True, help="folder for the embeddings (one encoder a folder)")
    parser.add_argument("--batch", type=int, default=64, help="images encoded at once (default 64)")
    parser.add_argument("--threads", type=int, default=2, help="decoding threads (default 2)")
    parser.add_argument("--images", action="store_true", help="images only, no captions")
    add_weights(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")


def run(args: argparse.Namespace) -> int:
    from index.embed.job import Options, embed_shards, rank_and_world
    from pretrain.encoder import load
    from pretrain.errors import UserError
    from pretrain.shards.source import open_source

    if args.batch < 1 or args.threads < 1:
        raise UserError(f"--batch {args.batch} and --threads {args.threads} must be at least 1")
    encoder = load(args.checkpoint, device=args.device, weights=args.weights)
    tars = list(dict.fromkeys(open_source(args.shards).shards))
    options = Options(args.batch, not args.images, args.threads, str(args.checkpoint.resolve()), args.weights)
    rank, world = rank_and_world()
    counts = embed_shards(encoder, tars, args.out, options, rank=rank, world=world)
    print(summary(counts, rank, world))
    return 0


def summary(counts: Counts, rank: int, world: int) -> str:
    """The line that shows that nothing was lost."""
    who = f"rank {rank} of {world}: " if world > 1 else ""
    skipped = counts.skipped.total()
    lines = [
        f"{who}{counts.tars} tars ({counts.known} done before), {counts.texts} captions; "
        f"{counts.rows} rows + {skipped} skipped = {counts.members} members"
    ]
    lines += [f"  skipped {n}: {reason}" for reason, n in counts.skipped.most_common()]
    return "\n".join(lines)
