"""A tiny Hydra run: its encoder, projector and gates in one checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain.checkpoint import CheckpointWriter, new_attempt, slice_for_rank
from pretrain.models.trunk import build_trunk
from pretrain.objectives import build
from pretrain.objectives.base import RunFacts
from pretrain.objectives.hydra import Hydra
from pretrain.recipe import parse_recipe
from tests.tiny import VIT, recipe_data

CLASSES = 7
OPTIONS = {"classes": CLASSES, "hidden": 12, "dim": 8, "gate_width": 6, "gate_hidden": 7}


def write_hydra_run(root: Path, *, seed: int = 1, step: int = 3, **options) -> Hydra:
    """A run folder at `root`; returns its objective. Weights are of `seed`, the recipe's seed is 0."""
    data = recipe_data(root / "shards", root, model=VIT | {"text": None}, objectives={"hydra": OPTIONS | options})
    recipe = parse_recipe(data, "test")
    trunk = build_trunk(recipe.model, seed=seed)
    facts = RunFacts(pooled_dim=trunk.pooled_dim, global_batch=12, total_steps=8, samples=60, seed=seed)
    objective = build(recipe.objectives, facts)["hydra"]
    assert isinstance(objective, Hydra)
    if objective.gates is not None:
        everyone = torch.arange(CLASSES)
        for _ in range(30):  # running statistics that belong to the weights
            objective.gates(everyone, everyone.flip(0))
    tensors = {f"model.{n}": t for n, t in trunk.state_dict().items()}
    tensors |= {f"objective.hydra.{n}": t for n, t in objective.state_dict().items()}
    writer = CheckpointWriter(root / "checkpoints", rank=0, world=1, attempt=new_attempt())
    writer.save(step, slice_for_rank(tensors, 0, 1), {"recipe": recipe.model_dump(mode="json")})
    writer.wait()
    return objective
