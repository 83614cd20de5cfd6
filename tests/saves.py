"""Saved states for tests of checkpoints: every type of tensor, written by ranks of one process, compared bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.checkpoint import CheckpointWriter, Where, slice_for_rank
from pretrain.checkpoint.layout import DTYPES

META = {"order": "abc", "samples_seen": 4096, "versions": {"torch": "2"}, "lr": 0.1}


def make_state(seed: int = 0, rows: int = 37) -> dict[str, Tensor]:
    """Every type, 0-d, empty, and a tensor that is not contiguous."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, dtype in DTYPES.items():
        raw = torch.randint(0, 256, (rows * 8 * dtype.itemsize,), dtype=torch.uint8, generator=g)
        raw = raw & 1 if dtype == torch.bool else raw
        state[f"model.{name}"] = raw.view(dtype).view(rows, 2, 4)  # NaNs and denormals too: bits are what counts
    state["objective.clip.logit_scale"] = torch.tensor([2.6592 + seed])
    state["optim.step"] = torch.tensor(seed, dtype=torch.int64)
    state["model.empty"] = torch.empty(0, 7, dtype=torch.float16)
    state["model.channels_last"] = torch.randn(2, 3, 4, 5, generator=g).contiguous(memory_format=torch.channels_last)
    return state


def bits(t: Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save(root: Where, step: int, state: dict[str, Tensor], world: int = 1, attempt: str = "a", **options) -> None:
    """All ranks of a world in one process; rank 0 last, so that its wait is short."""
    for rank in reversed(range(world)):
        writer = CheckpointWriter(root, rank=rank, world=world, attempt=attempt, **options)
        writer.save(step, slice_for_rank(state, rank, world), META)
        writer.wait()


def check(checkpoint, state: dict[str, Tensor]) -> None:
    assert set(checkpoint.names()) == set(state)
    for name, tensor in state.items():
        read = checkpoint.read(name)
        assert read.shape == tensor.shape == checkpoint.shape(name)
        assert read.dtype == tensor.dtype == checkpoint.dtype(name)
        assert bits(read) == bits(tensor), name
