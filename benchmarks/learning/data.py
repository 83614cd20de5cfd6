"""CIFAR-10 as shards for the trainer, and as pixels for the evaluation.

10,000 training images are trained on and vote; 2,000 others of the training images are for choosing settings; the
4,000 test images are looked at by runs whose settings are fixed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from downstream.samples import Samples
from pretrain.errors import UserError
from pretrain.views.decode import decode
from pretrain.views.geometry import eval_crop

ARCHIVE = "cifar10-24k.tar.gz"
SHARD = 2000
TRAIN_SHARDS, VALIDATION_SHARD = range(5), 9


class Labelled(NamedTuple):
    """Images as the tower sees them."""

    pixels: Tensor  # (N, 3, 32, 32) uint8
    labels: np.ndarray  # (N,)


def pack(work: Path) -> None:
    """The archive as shards in `work`, once; a shard of 2,000 is a random part of the images."""
    folder = os.environ.get("POLYVIEW_DATA")
    for split in ("train", "test"):
        out = work / split
        if out.exists():
            continue
        if not folder:
            raise UserError(f"POLYVIEW_DATA must name the folder that holds {ARCHIVE}")
        command = [str(Path(folder) / ARCHIVE), "--subdir", split, "--shard-size", str(SHARD), "--out", str(out)]
        subprocess.run([sys.executable, "-m", "pretrain", "pack", *command], check=True)


def shards(work: Path, split: str) -> list[str]:
    """Paths of the shards of `train`, `validation` or `test`."""
    if split == "test":
        return [str(path) for path in sorted((work / "test").glob("*.tar"))]
    chosen = TRAIN_SHARDS if split == "train" else [VALIDATION_SHARD]
    return [str(work / "train" / f"{n}.tar") for n in chosen]


def load(work: Path, split: str) -> Labelled:
    """All images of a split, decoded once and kept beside the shards."""
    kept = work / f"{split}.npz"
    if not kept.exists():
        parts = [Samples(shard) for shard in shards(work, split)]
        pixels = [eval_crop(decode(s.image(i)), 32) for s in parts for i in range(len(s))]
        labels = np.concatenate([s.labels(range(len(s))) for s in parts])
        np.savez(kept, pixels=torch.stack(pixels).numpy(), labels=labels)
    held = np.load(kept)
    return Labelled(torch.from_numpy(held["pixels"]), held["labels"])
