"""fp16: gradients that overflow cost a step and half the scale, on every backend and on all ranks alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.checkpoint import CheckpointWriter, open_checkpoint, step_dir
from pretrain.distributed.process import Process
from pretrain.optim.loss_scale import GROWTH_STEPS, START, LossScale
from pretrain.optim.schedule import Rates
from pretrain.parts import Parts, assemble
from pretrain.recipe import parse_recipe
from tests.pretrain.test_objective_steps import MODEL, ROWS, SAMPLES, global_batch
from tests.ranks import run_ranks
from tests.tiny import recipe_data

TOO_HIGH = 2.0**40
BACKENDS = ["ddp", "fsdp2", "zero2", "zero3"]


def parts_of(rank: int, world: int, backend: str, precision: str, at: str | None = None) -> Parts:
    changes: dict[str, Any] = {"optimizer": {"lr": 1e-3, "clip_norm": 1.0}, "global_batch": ROWS}
    data = recipe_data(Path("s"), Path("r"), model=MODEL, backend=backend, precision=precision, **changes)
    checkpoint = open_checkpoint(step_dir(Path(at), 1)) if at else None
    process = Process(rank, world, 0, torch.device("cpu"))
    return assemble(parse_recipe(data, "test"), SAMPLES, process, checkpoint)


def train(parts: Parts, rank: int, world: int, steps: list[int]) -> list[float | None]:
    """The gradient norm of every step, None where it was left out."""
    found = []
    for step in steps:
        rows = ROWS // world
        result = parts.step(global_batch(parts, step).rows(rank * rows, (rank + 1) * rows), Rates(1e-3, 0.1))
        found.append(None if result.grad_norm is None else result.grad_norm.item())
        assert result.overflowed == (result.grad_norm is None)
    return found


def held(parts: Parts) -> dict[str, torch.Tensor]:
    return {f"{f.name}@{f.offset}": f.data.clone() for f in parts.fragments() if f.name != "loss_scale"}


def overflow(rank: int, world: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for backend in BACKENDS:
        plain = parts_of(rank, world, backend, "fp16")
        plain.step.loss_scale.value = 8.0
        norms = train(plain, rank, world, [0, 1, 2])
        parts = parts_of(rank, world, backend, "fp16")
        parts.step.loss_scale.value = TOO_HIGH
        before = held(parts)
        left_out = train(parts, rank, world, [0])
        untouched = all(torch.equal(t, before[n]) for n, t in held(parts).items() if n in before)
        lower = parts.step.loss_scale.value
        parts.step.loss_scale.value = 8.0
        again = train(parts, rank, world, [0])
        at = f"{folder}/{backend}"
        writer = CheckpointWriter(Path(at), rank=rank, world=world, attempt="one")
        writer.save(1, parts.fragments(), {})
        writer.wait()
        if world > 1:
            dist.barrier()
        resumed = parts_of(rank, world, backend, "fp16", at)
        again += train(resumed, rank, world, [1, 2])
        same = all(torch.equal(t, held(plain)[n]) for n, t in held(resumed).items())
        fp32 = train(parts_of(rank, world, backend, "fp32"), rank, world, [0, 1, 2])
        found[backend] = (norms, left_out, untouched, lower, again, same, resumed.step.loss_scale.value, fp32)
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_an_overflow_leaves_all_as_it_was_and_lowers_the_scale(world, tmp_path):
    ranks = [overflow(0, 1, str(tmp_path))] if world == 1 else run_ranks(overflow, world, str(tmp_path))
    for found in ranks:
        for backend, (norms, left_out, untouched, lower, again, same, kept, fp32) in found.items():
            assert left_out == [None], backend
            assert untouched, backend
            assert lower == TOO_HIGH / 2, backend
            assert again == norms, backend
            assert same, backend  # the run that met the overflow, and was resumed, is the one that did not
            assert kept == 8.0, backend  # the scale is in the checkpoint
            assert norms == pytest.approx(fp32, rel=2e-2), backend
            assert norms != fp32, backend


def test_the_scale_grows_after_long_and_ends_at_one():
    scale = LossScale(Process(0, 1, 0, torch.device("cpu")), enabled=True)
    for _ in range(GROWTH_STEPS):
        scale.taken()
    assert scale.value == 2 * START
    while scale.overflowed():
        pass
    assert scale.value == 1.0  # from here on it is no overflow
