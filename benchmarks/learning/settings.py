"""What is trained: one small tower, one optimizer and schedule, and each method's own settings, as recipes.

SwAV's settings were chosen on images put aside of the training images (`--tune`): see docs/DECISIONS.md for what was
tried. lightly has the same ones; Hydra, its control and SupCon share the learning rate that was tried first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pretrain.recipe import ModelRecipe, Recipe, parse_recipe

TOWER = {"layers": [1, 1, 1, 1], "channels": [32, 64, 96, 128], "stem_type": "deep", "stem_width": 8}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODEL: dict[str, Any] = {
    "image": "resnet18",
    "image_size": 32,
    "image_kwargs": {**TOWER, "output_stride": 16},
    "text": None,
    "embed_dim": None,
    "mean": MEAN,
    "std": STD,
}
SNAPSHOTS = 12  # of a run, evenly spaced
SUPCON = "benchmarks.learning.supcon"

# lightly's own CIFAR-10 setting: jitter at half its strength, no blur; small crops as SwAV's, in proportion
SWAV: dict[str, Any] = {
    "crops": [[2, 32, [0.2, 1.0]], [2, 16, [0.05, 0.2]]],
    "jitter": [0.4, 0.4, 0.4, 0.1],
    "blur": 0.0,
    "prototypes": 100,
    "epsilon": 0.02,
    "hidden": 512,
    "dim": 128,
    "freeze_steps": 40,
}
VIEWS: dict[str, Any] = {"scale": [0.4, 1.0], "jitter": [0.4, 0.4, 0.2, 0.1], "grey": 0.1, "blur": 0.0}
HYDRA = {**VIEWS, "solarize": 0.0, "classes": 10, "hidden": 512, "dim": 128, "gate_width": 128, "gate_hidden": 256}


class Method(NamedTuple):
    """One thing to train, and how long."""

    objective: str
    options: dict[str, Any]
    lr: float
    batch: int
    steps: int
    peer: bool = False
    """Trained by lightly, from the same recipe."""


METHODS = {
    "swav": Method("swav", SWAV, 4e-3, 128, 120),
    "lightly": Method("swav", SWAV, 4e-3, 128, 120, peer=True),
    "hydra": Method("hydra", HYDRA, 2e-3, 256, 60),
    "open": Method("hydra", {**HYDRA, "gate": "open"}, 2e-3, 256, 60),
    "supcon": Method(SUPCON, {**VIEWS, "hidden": 512, "dim": 128}, 2e-3, 256, 60),
}
TITLES = {
    "swav": "SwAV, polyview",
    "lightly": "SwAV, lightly",
    "hydra": "Hydra",
    "open": "Hydra, gates open",
    "supcon": "SupCon",
}
TRIALS: dict[str, list[dict[str, Any]]] = {
    "swav": [{"lr": 1e-3, "epsilon": 0.05}, {"lr": 4e-3, "epsilon": 0.05}, {"lr": 4e-3}],
    "lightly": [{"lr": 1e-3, "epsilon": 0.05}, {"lr": 4e-3, "epsilon": 0.05}, {"lr": 4e-3}],
    "hydra": [{"lr": 1e-3}, {"lr": 4e-3}],
    "open": [{"lr": 1e-3}, {"lr": 4e-3}],
    "supcon": [{"lr": 1e-3}, {"lr": 4e-3}],
}
TRIAL_SHARE = 0.4  # of a whole run's steps


def model() -> ModelRecipe:
    return ModelRecipe.model_validate(MODEL)


def recipe(method: Method, shards: list[str], output: Path, seed: int) -> Recipe:
    """A run of the trainer; lightly's reads the same file."""
    data = {
        "name": output.name,
        "output": str(output),
        "world": 1,
        "seed": seed,
        "steps": method.steps,
        "global_batch": method.batch,
        "data": {"sources": [{"shards": shards}], "threads": 1},
        "model": MODEL,
        "objectives": {method.objective: method.options},
        "optimizer": {"lr": method.lr, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 1e-4},
        "schedule": {"warmup_steps": method.steps // 10},
        "checkpoint": {"every": -(-method.steps // SNAPSHOTS), "keep_last": SNAPSHOTS},
        "log": {"every": 20, "signals_every": method.steps, "tensorboard": False},
    }
    return parse_recipe(data, output.name)
