"""A writer killed at any moment leaves the checkpoint before, or a whole new one; never something between."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint import CheckpointWriter, Fragment, find_latest, slice_for_rank

FORK = multiprocessing.get_context("fork")  # a start costs milliseconds: many trials
SIZE = 400_000


def state_at(step: int) -> dict[str, Tensor]:
    """What the run holds at `step`: any mixture of two steps is seen."""
    x = torch.arange(SIZE, dtype=torch.float32).add_(step)
    return {"model.x": x, "optim.step": torch.tensor(step), "model.small": torch.full((7,), step)}


def save_for_ever(root: Path, rank: int, world: int, attempt: str, step: int) -> None:
    torch.set_num_threads(1)
    writer = CheckpointWriter(root, rank=rank, world=world, attempt=attempt, keep_last=2, file_limit=1 << 19)
    while True:
        step += 1
        fragments: list[Fragment] = slice_for_rank(state_at(step), rank, world)
        writer.save(step, fragments, {"step": step})


def check_latest(root: Path) -> int:
    """The step of the latest checkpoint, 0 for none, once its every bit has been seen to be right."""
    checkpoint = find_latest(root, verify=True)
    if checkpoint is None:
        return 0
    assert checkpoint.meta == {"step": checkpoint.step}
    for name, tensor in state_at(checkpoint.step).items():
        assert torch.equal(checkpoint.read(name), tensor), (checkpoint.step, name)
    return checkpoint.step


@pytest.mark.parametrize("world", [1, 2])
def test_kill_at_any_moment(tmp_path: Path, world: int) -> None:
    rng, root = random.Random(world), tmp_path / "checkpoints"
    latest, advanced, torn, trials = 0, 0, 0, 0
    stop = time.monotonic() + 12
    while time.monotonic() < stop and trials < 120:
        trials += 1
        ranks = [
            FORK.Process(target=save_for_ever, args=(root, r, world, f"t{trials}", latest), daemon=True)
            for r in range(world)
        ]
        for p in ranks:
            p.start()
        time.sleep(rng.uniform(0.005, 0.25))
        rng.shuffle(ranks)
        for p in ranks:  # the others may write on for a moment, as on a node that lives longer
            os.kill(p.pid, signal.SIGKILL)
            time.sleep(rng.choice([0, 0.01]))
        for p in ranks:
            p.join()
        found = check_latest(root)
        assert found >= latest, f"trial {trials}: step {latest} was whole, now the latest is {found}"
        advanced += found > latest
        latest = found
        torn += any(not (d / "manifest.json").exists() for d in root.glob("step_*"))
    assert trials >= 8
    assert advanced >= 3, "the writers never got anywhere: nothing was tested"
    assert torn >= 3, "no kill fell into a save: nothing was tested"
    assert 1 <= len([d for d in root.glob("step_*") if (d / "manifest.json").exists()]) <= 3
