"""Tiny shards and recipes: what every test of training, embedding and evaluation starts from."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pretrain.objectives.base import RunFacts

WORDS = ("red", "green", "blue", "round", "small", "large", "dark", "bright")

VIT = {
    "image": "vit_tiny_patch16_224",
    "image_size": 16,
    "image_kwargs": {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8},
    "text": {"width": 16, "layers": 2, "heads": 2, "context": 12},
    "embed_dim": 8,
}
"""A ViT without BatchNorm."""

RESNET = VIT | {"image": "test_resnet", "image_size": 32, "image_kwargs": {"drop_rate": 0.2}}
"""A ResNet with BatchNorm and dropout."""


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def picture(seed: int, size: int = 24) -> bytes:
    """A PNG of smooth colour noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder: Path, samples: int = 60, shards: int = 3) -> Path:
    """`samples` pictures with two captions and a label each, spread over `shards` tars of unequal length."""
    folder.mkdir(parents=True, exist_ok=True)
    cuts = [round(samples * (i / shards) ** 1.3) for i in range(shards + 1)]
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(cuts[shard], cuts[shard + 1]):
                add(tar, f"s{i:04d}.png", picture(i))
                add(tar, f"s{i:04d}.txt", f"a {WORDS[i % 8]} thing {i}\nthing {i}, {WORDS[i % 5]}".encode())
                add(tar, f"s{i:04d}.cls", str(i % 3).encode())
    (folder / "classnames.txt").write_text("zero\none\ntwo\n")
    return folder


def recipe_data(shards: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of seconds as plain data; `changes` replace top-level keys."""
    return {
        "name": "tiny",
        "output": str(output),
        "steps": 8,
        "global_batch": 12,
        "data": {"sources": [str(shards)]},
        "model": VIT,
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 2, "keep_last": 2},
        "log": {"every": 1, "signals_every": 4, "tensorboard": False},
    } | changes


def write_recipe(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


FACTS = RunFacts(pooled_dim=16, global_batch=12, total_steps=8, samples=60, seed=0)
"""What a run of `recipe_data` tells its objectives."""
