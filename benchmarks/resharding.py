"""A checkpoint of any backend and world, gone on with by any other: the whole matrix, writer by reader.

    python -m benchmarks.resharding --worlds 1 2 3 4

A small MoCo (queue, momentum teacher and its head, AdamW, BatchNorm's statistics in the tower) is trained 5 steps by
each writer, saved with the trainer's own writer, and gone on with for 10 steps by each reader. Each figure is the
largest relative difference of a loss from one process that was never interrupted; bar: 1e-6. A world is one launch for
all its writers and one for all its readers.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.distributed as dist

from benchmarks.common import parser, report
from benchmarks.curves import ALONE, difference, on, small, train
from pretrain.backend_names import BACKENDS
from pretrain.certify.shrink import SAMPLES
from pretrain.checkpoint import CheckpointWriter, open_checkpoint, step_dir
from pretrain.parts import assemble
from pretrain.recipe import Recipe
from tests.ranks import run_ranks

SAVED, STEPS = 5, 15
BAR = 1e-6
CASES = {"moco": "moco-v2-r50-200ep", "clip": "clip-vit-b32-laion400m"}


def recipe_of(case: str, backend: str) -> Recipe:
    return small(CASES[case]).model_copy(update={"backend": backend})


def write(rank: int, world: int, folder: str, case: str, backends: Sequence[str]) -> None:
    """Train SAVED steps with each backend and save into FOLDER/BACKEND_WORLD."""
    for backend in backends:
        recipe, process = recipe_of(case, backend), on(rank, world)
        parts = assemble(recipe, SAMPLES, process)
        train(parts, recipe, process, range(SAVED))
        writer = CheckpointWriter(Path(folder) / _name(backend, world), rank=rank, world=world, attempt="0")
        writer.save(SAVED, parts.fragments(), {})
        writer.close()
        dist.barrier()


def read(
    rank: int, world: int, folder: str, case: str, backends: Sequence[str], writers: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """Reader -> writer -> the losses of the steps after SAVED."""
    process, found = on(rank, world), {}
    for backend in backends:
        recipe, losses = recipe_of(case, backend), {}
        for writer in writers:
            checkpoint = open_checkpoint(step_dir(Path(folder) / writer, SAVED))
            parts = assemble(recipe, SAMPLES, process, checkpoint)
            losses[writer] = train(parts, recipe, process, range(SAVED, STEPS))
        found[_name(backend, world)] = losses
    return found


def matrix(case: str, worlds: Sequence[int], backends: Sequence[str]) -> Iterator[list[dict]]:
    """A row a writer, a column a reader; the whole of it anew with each world of readers."""
    recipe = recipe_of(case, "ddp")
    straight = train(assemble(recipe, SAMPLES, ALONE), recipe, ALONE, range(STEPS))[SAVED:]
    writers = [_name(b, w) for w in worlds for b in backends]
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            run_ranks(write, world, folder, case, backends)
        for world in worlds:
            found |= run_ranks(read, world, folder, case, backends, writers)[0]
            yield [{"writer": w, **{r: difference(of[w], straight) for r, of in found.items()}} for w in writers]


def _name(backend: str, world: int) -> str:
    return f"{backend}_{world}"


def main() -> int:
    p = parser(__doc__, rounds=False)
    p.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 3, 4])
    p.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    p.add_argument("--case", choices=CASES, default="moco")
    args = p.parse_args()
    title = f"{args.case}: largest relative difference of a loss from the uninterrupted run, bar {BAR:g}"
    for rows in matrix(args.case, args.worlds, args.backends):  # a world takes minutes
        report(title, rows, args)
    worst = max(figure for row in rows for name, figure in row.items() if name != "writer")
    print(f"worst {worst:.1e}")
    return 0 if worst <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
