"""What of a run fits a rank's memory, by the estimate of `memory`: which accumulation, which change, which backend."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.backend_names import BACKENDS
from pretrain.backends import check_combination
from pretrain.check import data, memory, sharding
from pretrain.check.memory import Modules
from pretrain.errors import UserError
from pretrain.recipe import Recipe, check_split

log = logging.getLogger(__name__)

RESERVE = 0.9
"""Share of a device's memory that the estimate may fill: the rest is for what is not counted (see `memory`)."""
GIB = 2**30


def resolve_local_batch(recipe: Recipe, world: int, device: torch.device, there: int | None = None) -> Recipe:
    """The recipe with `accumulation` in place of `local_batch`; as it is where it gives none.

    auto: the smallest accumulation whose estimate fits the memory of this rank's device, or `there` bytes. Ranks with
    other memory would choose another, so one of them is asked.

    Raises:
        UserError: a local batch that does not divide a rank's share; nothing fits; both keys are given.
    """
    if recipe.local_batch is None:
        return recipe
    if recipe.accumulation > 1:
        raise UserError("local_batch and accumulation say the same; give one of them")
    try:
        check_split(recipe.global_batch, world, 1)
    except ValueError as error:
        raise UserError(str(error)) from None
    if recipe.local_batch == "auto":
        accumulation = _fitting(recipe, world, device, there or memory_of(device, world))
    else:
        accumulation = _dividing(recipe.global_batch // world, recipe.local_batch)
    return recipe.model_copy(update={"accumulation": accumulation, "local_batch": None})


def _dividing(share: int, wanted: int) -> int:
    if share % wanted == 0:
        return share // wanted
    fit = [n for n in range(1, share + 1) if share % n == 0]
    near = dict.fromkeys((max(n for n in fit if n < wanted), min((n for n in fit if n > wanted), default=share)))
    raise UserError(
        f"local_batch {wanted} does not divide a rank's {share} samples of a step; try {' or '.join(map(str, near))}"
    )


def _fitting(recipe: Recipe, world: int, device: torch.device, there: int) -> int:
    modules = memory.build(recipe, recipe.global_batch, world)
    modules.tokens = data.caption_tokens(recipe, data.look(recipe))
    host = device.type == "cpu"
    accumulation = smallest_accumulation(recipe, modules, RESERVE * there, world, host=host)
    if accumulation is None:
        raise UserError(f"local_batch auto: {advice(recipe, modules, there, world, host=host)}")
    chosen = recipe.model_copy(update={"accumulation": accumulation})
    needed = memory.rank(chosen, modules, world=world, host=host)["total_bytes"]
    local = recipe.global_batch // (world * accumulation)
    log.info(
        f"local_batch auto: {local} samples at once, accumulation {accumulation}: about {needed / GIB:.2f} of "
        f"{there / GIB:.2f} GiB a rank"
    )
    if accumulation > 1 and any(isinstance(m, _BatchNorm) and m.training for m in modules.trunk.modules()):
        log.warning(
            f"local_batch auto: accumulation {accumulation} and the BatchNorm of the towers: their statistics are of "
            "a micro-batch, so another accumulation is another run; give local_batch as a number to fix it"
        )
    return accumulation


def memory_of(device: torch.device, world: int) -> int:
    """Bytes of the device that are a rank's: all of a GPU, its share of what is free in host memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", world))


def smallest_accumulation(
    recipe: Recipe, modules: Modules, room: float, world: int, *, host: bool = False
) -> int | None:
    """The smallest divisor of a rank's share of the batch that makes a rank fit `room` bytes; None: none does."""
    share = recipe.global_batch // world
    for k in (k for k in range(1, share + 1) if share % k == 0):
        tried = recipe.model_copy(update={"accumulation": k})
        if memory.rank(tried, modules, world=world, host=host)["total_bytes"] <= room:
            return k
    return None


def advice(recipe: Recipe, modules: Modules, device_bytes: int, world: int, *, host: bool = False) -> str:
    """That it does not fit, and the first of what would, in the order of what it costs."""
    needed = memory.rank(recipe, modules, world=world, host=host)["total_bytes"]
    said = f"a rank needs about {needed / GIB:.1f} GiB, more than {RESERVE:.0%} of a GPU of {device_bytes / GIB:g} GiB"
    said = said.replace("a GPU of", "its share,") if host else said
    for changes, tried in ways(recipe, world):
        k = smallest_accumulation(tried, modules, RESERVE * device_bytes, world, host=host)
        if k:
            return f"{said}: {' '.join([*changes, split(recipe, world, k)])} would fit"
    return f"{said}; no accumulation, precision or backend makes it fit: more ranks, or a smaller model"


def split(recipe: Recipe, world: int, accumulation: int) -> str:
    """The override that takes the batch in so many parts, by the key that the recipe has: it may give one of them."""
    if recipe.local_batch is not None:
        return f"local_batch={recipe.global_batch // (world * accumulation)}"
    return f"accumulation={accumulation}"


def ways(recipe: Recipe, world: int) -> Iterator[tuple[list[str], Recipe]]:
    """(overrides, the recipe with them), each with those before it, but for a backend, which replaces another."""
    changes: list[str] = []
    yield changes, recipe
    if recipe.precision in ("auto", "fp32"):
        changes, recipe = [*changes, "precision=bf16"], recipe.model_copy(update={"precision": "bf16"})
        yield changes, recipe
    if not recipe.compute.checkpoint_blocks:
        compute = recipe.compute.model_copy(update={"checkpoint_blocks": True})
        changes, recipe = [*changes, "compute.checkpoint_blocks=true"], recipe.model_copy(update={"compute": compute})
        yield changes, recipe
    for tried in _backends(recipe) if world > 1 else ():
        yield [*changes, f"backend={tried.backend}"], tried


def by_backend(recipe: Recipe, modules: Modules, world: int) -> dict[str, dict[str, Any]]:
    """What a rank holds from step to step, and in all, under every backend that the recipe can have."""
    found: dict[str, dict[str, Any]] = {}
    for tried in _backends(recipe):
        state = sharding.state(tried, modules.trunk, modules.joint, modules.teacher, world=world)
        total = memory.rank(tried, modules, world=world)["total_bytes"]
        found[tried.backend] = {"state_bytes": sum(state.values()), "total_bytes": total}
    return found


def _backends(recipe: Recipe) -> Iterator[Recipe]:
    for backend in sorted(BACKENDS, key=lambda name: sum(name in spread for spread in sharding.SPREAD.values())):
        tried = recipe.model_copy(update={"backend": backend})
        try:
            check_combination(tried)
        except UserError:
            continue
        yield tried
