"""The worlds that certify, in turn: `python -m pretrain.certify.worlds FOLDER`, started by `run.py`; gloo, CPU.

A process of its own, since ranks are forked from it.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pretrain.certify.cells import certify_world
from pretrain.certify.peers import peers_at
from pretrain.distributed.process import Process
from pretrain.launch import run_world
from pretrain.recipe import load_recipe


def main(folder: Path) -> int:
    """Certify what `folder` asks at every world, to the first that fails."""
    worlds = json.loads((folder / "asked.json").read_text())["worlds"]
    return next((code for world in worlds if (code := run_world(world, one_rank, folder))), 0)


def one_rank(folder: Path) -> None:
    """Certify at this rank's world; rank 0 writes what was found."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # newer names of its own calls
    process = Process(rank, world, rank, torch.device("cpu"))
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    recipe, asked = load_recipe(folder / "recipe.yaml"), json.loads((folder / "asked.json").read_text())
    expected = {file.stem: load_file(file) for file in folder.glob("*.safetensors")}
    cells = certify_world(process, recipe, expected, asked["backends"], asked["accumulations"])
    peers = peers_at(process, list(recipe.objectives)) if world > 1 else []
    if process.first:
        found = {"cells": [asdict(c) for c in cells], "peers": [asdict(p) for p in peers]}
        (folder / f"found_{world}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
