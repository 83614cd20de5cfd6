"""Out of memory, told so that a person can act: what was held, and which change of the recipe would make it fit."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.recipe import Recipe
from pretrain.telemetry import memory_gib

GIB = 2**30
MOST_WAYS = 3
LARGEST = 30
"""Blocks named one by one."""
SIGNS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "_ALLOC_FAILED")
"""How torch and CUDA's libraries say it where they raise a plain RuntimeError."""


@contextmanager
def memory_explained(
    recipe: Recipe, process: Process, folder: Path, may_write: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Within: running out of memory is a UserError with advice, and what was held then is in RUN/oom/rank_R.*.

    may_write: raises where a later start has taken the run over; that is told instead.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(s in str(error) for s in SIGNS)):
            raise
        may_write()
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        said = f"{_place(process)} ran out of memory: {message}{_note(folder / 'oom', message, process)}"
        ways = "\n  ".join(_advice(recipe, process))
        raise UserError(f"{said}\nwhat would help, the cheapest first:\n  {ways}") from error


def _place(process: Process) -> str:
    where = f"GPU {process.device.index}" if process.device.type == "cuda" else "the CPU"
    return f"rank {process.rank} on {platform.node()}, {where},"


def _note(folder: Path, message: str, process: Process) -> str:
    """Write down what is held; where that is, for the message. A full disk costs the note only."""
    file = folder / f"rank_{process.rank:05d}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if process.device.type == "cuda":
            segments = torch.cuda.memory._snapshot()["segments"]
            file.with_suffix(".json").write_text(json.dumps(segments, default=str))
            held = f"{_largest(segments)}\n{torch.cuda.memory_summary(process.device)}"
        else:
            held = f"resident at most: {memory_gib():.2f} GiB"
        file.write_text(f"{message}\n\n{held}\n")
    except OSError:
        return ""
    return f" (what was held: {file})"


def _largest(segments: list[dict]) -> str:
    """The largest blocks in use, one a line, as `torch.cuda.memory._snapshot` lists them."""
    used = [b["size"] for s in segments for b in s["blocks"] if b["state"] == "active_allocated"]
    lines = [f"{size / GIB:9.3f} GiB" for size in sorted(used, reverse=True)[:LARGEST]]
    return "\n".join([f"{len(used)} blocks in use, {sum(used) / GIB:.2f} GiB; the largest:", *lines])


def _advice(recipe: Recipe, process: Process) -> list[str]:
    """Overrides that need less by the estimate, cheapest first; without an estimate what helps in general."""
    try:
        return _estimated(recipe, process) or ["more ranks, or a smaller model: by the estimate nothing else does"]
    except Exception:  # whatever the estimate lacks, the first error is the one to tell of
        smaller = "a larger accumulation, or a smaller local_batch"
        return [smaller, "precision=bf16", "compute.checkpoint_blocks=true", "backend=fsdp2 or zero3"]


def _estimated(recipe: Recipe, process: Process) -> list[str]:
    from pretrain.check import data, fit, memory  # not needed by a run that fits

    world, host = process.world, process.device.type == "cpu"
    parts = fit.resolve_local_batch(recipe, world, process.device).accumulation
    recipe = recipe.model_copy(update={"accumulation": parts})  # as it ran, but with the key that a person has written
    modules = memory.build(recipe, recipe.global_batch, world)
    modules.tokens = data.caption_tokens(recipe, data.look(recipe))

    def needed(tried: Recipe) -> int:
        return memory.rank(tried, modules, world=world, host=host)["total_bytes"]

    # the estimate leaves things out: where it says that this very recipe fits, less than it must do
    room = fit.RESERVE * min(fit.memory_of(process.device, world), needed(recipe))
    found = []
    for changes, tried in fit.ways(recipe, world):
        k = fit.smallest_accumulation(tried, modules, room, world, host=host)
        if k is not None:
            fits = tried.model_copy(update={"accumulation": k})
            overrides = " ".join([*changes, fit.split(recipe, world, k)] if k != recipe.accumulation else changes)
            found.append(f"{overrides}: about {needed(fits) / GIB:.2f} GiB a rank, {needed(recipe) / GIB:.2f} now")
    return found[:MOST_WAYS]
