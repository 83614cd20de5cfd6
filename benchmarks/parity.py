"""Loss curves of every backend over ranks beside one process on the same global batches, fp32 and bf16.

    python -m benchmarks.parity --worlds 2 3

Bars, of the largest relative difference of a loss in 20 steps of AdamW: 1e-6 in fp32, 2e-3 in bf16 (beside one process
in bf16). BatchNorm over a few small crops amplifies fp32's rounding step by step, so a tower with it is held to the bar
in float64 (fp64), and its fp32 figure stands beside it without one. Every world is one launch of gloo ranks that runs
all backends and cases in turn.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from itertools import product

import torch

from benchmarks.common import parser, report
from benchmarks.curves import ALONE, BACKENDS, difference, on, small, train
from pretrain.certify.cells import drawn_in
from pretrain.certify.shrink import SAMPLES
from pretrain.distributed.process import Process
from pretrain.parts import assemble
from pretrain.recipe import Recipe
from tests.ranks import run_ranks

STEPS = 20
BARS = {"fp32": 1e-6, "bf16": 2e-3, "fp64": 1e-6}
VIT = ("model.image=vit_small_patch16_224", "model.image_kwargs={dynamic_img_size: true}")
IN_FLOAT64 = "swav, BatchNorm in the tower"
CASES = {
    "clip": ("clip-vit-b32-laion400m",),
    "swav": ("swav-r50-800ep", *VIT),
    IN_FLOAT64: ("swav-r50-800ep",),
    "pyramid_clip": ("pyramidclip-vit-b16-yfcc15m",),
}
"""What is trained: a shipped recipe, and changes to it."""


def curves(
    process: Process, cases: Sequence[str], precisions: Sequence[str], backends: Sequence[str], steps: int
) -> Iterator[tuple[str, str, str, str, list[float]]]:
    """(case, precision, backend, the engine that ran, its losses) of every combination."""
    for case, precision, backend in product(cases, precisions, backends):
        if precision == "fp64" and case != IN_FLOAT64:
            continue
        autocast = "bf16" if precision == "bf16" else "fp32"
        recipe: Recipe = small(*CASES[case]).model_copy(update={"backend": backend, "precision": autocast})
        with drawn_in(torch.float64 if precision == "fp64" else torch.float32):
            parts = assemble(recipe, SAMPLES, process)
        yield case, precision, backend, parts.backend.describe(), train(parts, recipe, process, range(steps))


def over_ranks(rank: int, world: int, *asked) -> list[tuple]:
    return list(curves(on(rank, world), *asked))


def compare(
    worlds: Sequence[int], cases: Sequence[str], precisions: Sequence[str], backends: Sequence[str], steps: int
) -> list[dict]:
    """A row a case, precision, backend and world."""
    alone = {(c, p): losses for c, p, _, _, losses in curves(ALONE, cases, precisions, ["ddp"], steps)}
    rows = []
    for world in worlds:
        for case, precision, backend, engine, losses in run_ranks(
            over_ranks, world, cases, precisions, backends, steps
        )[0]:
            off, bar = difference(losses, alone[case, precision]), BARS[precision]
            if precision == "fp32" and case == IN_FLOAT64:
                bar = math.inf
            row = {"case": case, "precision": precision, "world": world, "backend": backend, "engine": engine}
            rows.append(row | {"largest difference": off, "bar": bar, "holds": off <= bar})
    return rows


def main() -> int:
    p = parser(__doc__)
    p.add_argument("--worlds", type=int, nargs="+", default=[2, 3])
    p.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    p.add_argument("--precisions", nargs="+", choices=BARS, default=list(BARS))
    p.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    p.add_argument("--steps", type=int, default=STEPS)
    args = p.parse_args()
    rows = compare(args.worlds, args.cases, args.precisions, args.backends, args.steps)
    report(f"largest relative difference of a loss from one process, {args.steps} steps", rows, args)
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
