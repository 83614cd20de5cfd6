"""The arithmetic of a run: batch, steps, learning rate, time, checkpoints."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from pretrain.optim.schedule import lr_at
from pretrain.recipe import Recipe, check_split


def essentials(recipe: Recipe, world: int) -> dict[str, Any]:
    """What the recipe is, resolved."""
    return {
        "name": recipe.name,
        "output": str(recipe.output),
        "objectives": ", ".join(recipe.objectives),
        "precision": recipe.precision,
        "init": str(recipe.init.weights) if recipe.init else "from nothing",
        "global_batch": recipe.global_batch,
        "world": world,
        "accumulation": recipe.accumulation,
        "micro_batch": recipe.global_batch / (world * recipe.accumulation),
    }


def problems(recipe: Recipe, world: int) -> list[str]:
    """What in the recipe's own numbers and paths would refuse the run."""
    found = []
    if recipe.world is not None and recipe.world != world:
        found.append(f"the recipe says world: {recipe.world}, --world {world}: add world={world} to the command")
    try:
        check_split(recipe.global_batch, world, recipe.accumulation)
    except ValueError as error:
        found.append(str(error))
    if recipe.init and not recipe.init.weights.exists():
        found.append(f"init.weights: no file {recipe.init.weights}")
    return found


def plan(recipe: Recipe, steps: int, samples: int | None, images_per_s: float | None) -> dict[str, Any]:
    """Steps, epochs, learning rate by step, and the time they take."""
    schedule, peak = recipe.schedule, recipe.optimizer.lr
    seen = steps * recipe.global_batch
    found: dict[str, Any] = {"steps": steps, "samples_seen": seen}
    if samples:
        found |= {"epochs": round(seen / samples, 2), "samples_an_epoch": samples}
    marks = {0, min(schedule.warmup_steps, steps - 1), steps // 2, steps - 1}
    found["lr_by_step"] = {f"{step + 1}": float(f"{lr_at(step, steps, peak, schedule):.4g}") for step in sorted(marks)}
    if images_per_s:
        found |= {"images_per_s": images_per_s, "time_s": seen / images_per_s}
    return found


def schedule_problems(recipe: Recipe, steps: int) -> list[str]:
    """A warm-up that never ends."""
    warmup = recipe.schedule.warmup_steps
    if warmup < steps:
        return []
    return [
        f"schedule.warmup_steps {warmup} is not less than the run's {steps} steps, so the learning rate never reaches "
        f"optimizer.lr; about {max(1, steps // 20)} would be usual"
    ]


def checkpoints(recipe: Recipe, steps: int | None, one: int) -> dict[str, Any]:
    """How many are written and how much room is taken; `one` is the bytes of one."""
    found: dict[str, Any] = {"one_bytes": one, "keep_last": recipe.checkpoint.keep_last}
    if not steps:
        return found
    written = math.ceil(steps / recipe.checkpoint.every)
    kept = min(written, recipe.checkpoint.keep_last)
    if recipe.checkpoint.keep_every:
        kept += max(0, steps // recipe.checkpoint.keep_every - kept)
    # one more: it is whole before the oldest goes
    return found | {"written": written, "kept": kept, "most_bytes": one * (kept + (written > kept))}


def disk(recipe: Recipe, need: int) -> str | None:
    """A note where the checkpoints do not fit the disk."""
    folder = next(p for p in (recipe.output, *Path(recipe.output).absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free >= need:
        return None
    return f"checkpoints take up to {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free at {folder}"
