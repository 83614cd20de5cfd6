"""A fragment: the piece of one tensor that one rank holds, as a flat range of the tensor's row-major
elements.

DDP (a slice each), FSDP2 (its rows) and ZeRO (its partition) all hold flat ranges, so this is the only shape
in which state enters a checkpoint, and any reader takes whatever ranges it needs. This module knows no
backend: each backend turns what it holds into fragments itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.layout import DTYPE_NAMES


@dataclass(frozen=True)
class Fragment:
    """Elements [offset, offset + len(data)) of the tensor `name`, whose full shape is `shape`.

    `data` is flat (one dimension), of type `dtype`, on any device. A 0-d tensor has one element; an empty
    tensor is a fragment of length 0, without which nobody would know that it exists.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    data: Tensor

    @property
    def numel(self) -> int:
        """Elements of the full tensor."""
        return math.prod(self.shape)

    def check(self) -> None:
        """Raise CheckpointError, naming the tensor, if this piece cannot be of such a tensor."""
        length = self.data.numel()
        if self.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"tensor {self.name!r}: type {self.dtype} cannot be stored in a checkpoint")
        if self.data.dtype != self.dtype:
            raise CheckpointError(
                f"tensor {self.name!r}: the piece at {self.offset} is {self.data.dtype}, not {self.dtype}"
            )
        if self.data.dim() != 1:
            raise CheckpointError(f"tensor {self.name!r}: a fragment's data must be flat, not {self.data.shape}")
        if self.offset < 0 or self.offset + length > self.numel:
            raise CheckpointError(
                f"tensor {self.name!r}: elements [{self.offset}, {self.offset + length}) lie outside "
                f"its shape {tuple(self.shape)} of {self.numel} elements"
            )


def slice_for_rank(tensors: Mapping[str, Tensor], rank: int, world: int) -> list[Fragment]:
    """The equal share of `tensors`, alike on every rank, that `rank` of `world` should write.

    All tensors are laid end to end in the mapping's order, and the line is cut into `world` slices whose
    lengths differ by at most one element; the ranks' slices together are every element exactly once. Empty
    tensors go to rank 0. The fragments are views where the tensor is contiguous.
    """
    total = sum(t.numel() for t in tensors.values())
    lo, hi = rank * total // world, (rank + 1) * total // world
    fragments, start = [], 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel()
        first, last = max(lo, start), min(hi, stop)
        if first < last or (start == stop and rank == 0):
            first, last = max(first, start), max(last, start)  # an empty tensor: its own place, length 0
            flat = tensor.detach().reshape(-1)[first - start : last - start]
            fragments.append(Fragment(name, tuple(tensor.shape), tensor.dtype, first - start, flat))
        start = stop
    return fragments
