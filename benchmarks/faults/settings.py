"""What a run of the campaign is, drawn from (seed, number) alone: the recipe, the fault, and when it strikes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pretrain.backend_names import BACKENDS
from pretrain.recipe import Recipe
from tests.tiny import RESNET, VIT

STEPS, SAVE_EVERY, BATCH = 24, 3, 12
SAMPLES = 480
HANG_S = 6.0
KINDS = ("kill", "preempt", "disk", "damage", "nan-raise", "nan-skip", "nan-rewind", "reader", "hang")
Tower = Literal["vit", "resnet"]

TOWERS: dict[Tower, dict[str, Any]] = {"vit": VIT, "resnet": RESNET}


@dataclass(frozen=True)
class Plan:
    """One run: everything about it that chance decides, but for the machine's own timing."""

    number: int
    kind: str
    backend: str
    world: int
    tower: Tower
    step: int
    """It strikes when this step has been logged…"""
    delay_s: float
    """…and so long after, or at once when a save is under way (`saving`)."""
    saving: bool
    rank: int | None
    """Whom it strikes; None: the launcher."""
    draw: random.Random
    """For what only one kind needs."""

    @property
    def poisoned(self) -> bool:
        return self.kind.startswith("nan")


def plan(seed: int, number: int) -> Plan:
    """Run `number` of the campaign of `seed`."""
    rng = random.Random(f"{seed}/{number}")
    kind, backend, world = rng.choice(KINDS), rng.choice(BACKENDS), rng.choice((2, 3))
    return Plan(
        number,
        kind,
        backend,
        world,
        tower=rng.choice(list(TOWERS)),
        step=rng.randint(1, STEPS - 4),
        delay_s=rng.choice((0.0, rng.uniform(0, 0.4))),
        saving=rng.random() < 0.5,
        rank=rng.choice((None, *range(world))),
        draw=rng,
    )


def recipe(plan: Plan, output: Path, shards: Path, **changes: Any) -> Recipe:
    """The recipe of `plan`'s run in folder `output`; `changes` replace whole sections."""
    settings = {
        "name": output.name,
        "output": output,
        "world": plan.world,
        "backend": plan.backend,
        "steps": STEPS,
        "global_batch": BATCH,
        "data": {"sources": [str(shards)]},
        "model": TOWERS[plan.tower],
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": SAVE_EVERY, "keep_last": 2},
        "log": {"every": 1, "signals_every": STEPS, "tensorboard": False},
        "faults": {"heartbeat_s": 0.5},
    }
    return Recipe.model_validate(settings | changes)
