"""Tiny checkpoints and shards for the evaluations' tests."""

from __future__ import annotations

import tarfile
from pathlib import Path

from pretrain.checkpoint import CheckpointWriter, new_attempt, slice_for_rank
from pretrain.models.trunk import build_trunk
from pretrain.recipe import parse_recipe
from tests.tiny import VIT, add, recipe_data


def write_run(root: Path, *, seed: int = 1, step: int = 3, **model) -> Path:
    """A run folder with one checkpoint of a tiny encoder: weights of `seed`, a recipe of seed 0."""
    data = recipe_data(root / "shards", root, model=VIT | model)
    recipe = parse_recipe(data, "test").model_dump(mode="json")
    trunk = build_trunk(parse_recipe(data, "test").model, seed=seed)
    tensors = {f"model.{name}": t for name, t in trunk.state_dict().items()}
    writer = CheckpointWriter(root / "checkpoints", rank=0, world=1, attempt=new_attempt())
    writer.save(step, slice_for_rank(tensors, 0, 1), {"recipe": recipe})
    writer.wait()
    return root


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> Path:
    """One shard: each sample's members by extension; returns its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, members in enumerate(samples):
            for extension, data in members.items():
                add(tar, f"k{i:03d}.{extension}", data)
    return path.parent
