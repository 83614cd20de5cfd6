"""Loss curves of every backend over ranks beside one process on the same global batches, fp32, bf16 and fp64.

    python -m benchmarks.parity --worlds 2 3

The largest relative difference of a loss in 20 steps of AdamW from one process that takes the global batch at once.
Bars: 1e-6 in fp32, 2e-3 in bf16. "one process" is the same again in as many parts as there are ranks (accumulation): in
bf16 it shows the noise of the format itself, which averages out over wider towers, so there they are WIDE, not 32.

BatchNorm over a few small crops amplifies fp32's rounding step by step, so a tower with it is held to the bar in
float64, and its fp32 figure stands beside it without one. Every world and precision is one launch of gloo ranks that
runs all backends and cases in turn.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch

from benchmarks.common import parser, report
from benchmarks.curves import ALONE, difference, on, small, train
from pretrain.backend_names import BACKENDS
from pretrain.certify.cells import drawn_in
from pretrain.certify.shrink import SAMPLES
from pretrain.distributed.process import Process
from pretrain.parts import assemble
from pretrain.recipe import Recipe
from tests.ranks import run_ranks

STEPS = 20
BARS = {"fp32": 1e-6, "bf16": 2e-3, "fp64": 1e-6}
WIDE = 128
VIT = ("model.image=vit_small_patch16_224", "model.image_kwargs={dynamic_img_size: true}")
IN_FLOAT64 = "swav, BatchNorm in the tower"
CASES = {
    "clip": ("clip-vit-b32-laion400m",),
    "swav": ("swav-r50-800ep", *VIT),
    IN_FLOAT64: ("swav-r50-800ep",),
    "pyramid_clip": ("pyramidclip-vit-b16-yfcc15m",),
}
"""What is trained: a shipped recipe, and changes to it."""


def curve(process: Process, case: str, precision: str, steps: int, **changes: Any) -> tuple[str, list[float]]:
    """The engine that ran, and its losses."""
    recipe = small(*CASES[case]).model_copy(update=changes)
    if precision == "bf16":
        recipe = widened(recipe)
    with drawn_in(torch.float64 if precision == "fp64" else torch.float32):
        parts = assemble(recipe, SAMPLES, process)
    return parts.backend.describe(), train(parts, recipe, process, range(steps))


def widened(recipe: Recipe) -> Recipe:
    """In bf16, its transformers and SwAV's head WIDE."""
    model, objectives = recipe.model, recipe.objectives
    changes: dict[str, Any] = {"image_kwargs": model.image_kwargs | {"embed_dim": WIDE, "num_heads": 4}}
    if model.text:
        changes |= {"text": model.text.model_copy(update={"width": WIDE, "heads": 4}), "embed_dim": WIDE // 2}
    if "swav" in objectives:
        wide = {"hidden": WIDE, "dim": WIDE // 2, "prototypes": 48}
        objectives = objectives | {"swav": dict(objectives["swav"]) | wide}  # type: ignore[arg-type]
    model = model.model_copy(update=changes)
    return recipe.model_copy(update={"precision": "bf16", "model": model, "objectives": objectives})


def over_ranks(
    rank: int, world: int, cases: Sequence[str], precision: str, backends: Sequence[str], steps: int
) -> list[tuple[str, str, str, list[float]]]:
    """(case, backend, engine, losses) of each."""
    process = on(rank, world)
    return [(c, b, *curve(process, c, precision, steps, backend=b)) for c, b in product(cases, backends)]


def compare(
    world: int, cases: Sequence[str], precision: str, backends: Sequence[str], steps: int
) -> Iterator[dict[str, Any]]:
    """A row a case and backend at `world`, and one of one process in as many parts."""
    cases = [c for c in cases if c != IN_FLOAT64 or precision != "bf16"]
    if precision == "fp64":
        cases = [c for c in cases if c == IN_FLOAT64]
    alone = {(c, n): curve(ALONE, c, precision, steps, accumulation=n) for c in cases for n in (1, world)}
    found = run_ranks(over_ranks, world, cases, precision, backends, steps)[0]
    for case, backend, engine, losses in [*((c, "one process", *alone[c, world]) for c in cases), *found]:
        off = difference(losses, alone[case, 1][1])
        held = backend != "one process" and (case != IN_FLOAT64 or precision == "fp64")
        row = {"case": case, "precision": precision, "world": world, "backend": backend, "engine": engine}
        bar = BARS[precision] if held else None
        yield row | {"largest difference": off, "bar": bar, "holds": bar is None or off <= bar}


def main() -> int:
    p = parser(__doc__, rounds=False)
    p.add_argument("--worlds", type=int, nargs="+", default=[2, 3])
    p.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    p.add_argument("--precisions", nargs="+", choices=BARS, default=list(BARS))
    p.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    p.add_argument("--steps", type=int, default=STEPS)
    args = p.parse_args()
    rows: list[dict[str, Any]] = []
    for world, precision in product(args.worlds, args.precisions):
        rows += compare(world, args.cases, precision, args.backends, args.steps)
        report(f"largest relative difference of a loss from one process, {args.steps} steps", rows, args)
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
