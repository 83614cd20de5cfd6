"""What one rank holds under ZeRO, told by the names of whole tensors.

Stages 1 and 2 lay all parameters of an optimizer group end to end and cut the line into equal partitions, so a
partition may begin and end inside a tensor. Stage 3 cuts every tensor by itself and lays a rank's cuts end to end. Both
pad at the end; a piece never reaches into padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.backends.state import stored_slots
from pretrain.checkpoint import Checkpoint, Fragment


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + length) of a parameter, which lie at `start` in the flat partition `flat`."""

    name: str
    shape: tuple[int, ...]
    offset: int
    length: int
    flat: Tensor
    start: int

    def of(self, flat: Tensor) -> Tensor:
        """This piece of the partition, or of anything that lies as the partition does."""
        return flat[self.start : self.start + self.length]


def pieces(zero: Any, parameters: Iterable[tuple[str, Any]], rank: int) -> list[Piece]:
    """This rank's pieces of the trained parameters in the fp32 partitions of a DeepSpeed ZeRO optimizer."""
    held = []
    for name, p in parameters:
        if not p.requires_grad:
            continue
        if hasattr(p, "ds_id"):
            group, start, _ = zero.grad_position[zero.get_param_id(p)]
            offset, length = range_of(p, rank)
            held.append(Piece(name, tuple(p.ds_shape), offset, length, zero.fp32_partitioned_groups_flat[group], start))
        elif (at := p._hp_mapping) is not None:
            own, flat = at.lp_fragment_address, zero.single_partition_of_fp32_groups[at.param_group_index]
            held.append(Piece(name, tuple(p.shape), own.start, own.numel, flat, at.hp_fragment_address.start))
    return [piece for piece in held if piece.length]


def reduced(zero: Any, parameters: Iterable[Any], rank: int) -> list[Tensor]:
    """This rank's pieces of the mean gradient, between the last backward and the step; to be changed in place."""
    if hasattr(zero, "fp16_groups"):  # stage 3
        held = zero.get_fp32_grad_partitions()
        at = [(g, i, p) for g, group in enumerate(zero.fp16_groups) for i, p in enumerate(group)]
        return [held[g][i].view(-1)[: range_of(p, rank)[1]] for g, i, p in at]
    trained = [p for p in parameters if p.requires_grad and p._hp_mapping is not None]
    return [p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group) for p in trained]


def range_of(p: Any, rank: int) -> tuple[int, int]:
    """(offset, length) of the row-major elements of a ZeRO-3 parameter that `rank` holds."""
    size = p.partition_numel()
    offset = min(rank * size, p.ds_numel)
    return offset, min(size, p.ds_numel - offset)


def cuts(parameters: Iterable[tuple[str, Any]], rank: int) -> Iterator[tuple[str, tuple[int, ...], int, Tensor]]:
    """(name, whole shape, offset, this rank's elements) of ZeRO-3 parameters, trained or not."""
    for name, p in parameters:
        offset, length = range_of(p, rank)
        if length:
            yield name, tuple(p.ds_shape), offset, p.ds_tensor.data.view(-1)[:length]


def optimizer_fragments(held: Iterable[Piece], optimizer: torch.optim.Optimizer) -> Iterator[Fragment]:
    """``optim.<parameter>.<slot>`` of every piece; a scalar slot is written by who holds the tensor's beginning."""
    for piece in held:
        for slot, value in optimizer.state.get(piece.flat, {}).items():
            name = f"optim.{piece.name}.{slot}"
            if value.shape == piece.flat.shape:
                yield Fragment(name, piece.shape, value.dtype, piece.offset, piece.of(value))
            elif piece.offset == 0:
                yield Fragment(name, tuple(value.shape), value.dtype, 0, value.reshape(-1))


def load_optimizer(held: Iterable[Piece], optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Rebuild the state of the partitions; where the checkpoint has none for a parameter, it is zero."""
    slots = stored_slots("optim", checkpoint)
    optimizer.state.clear()
    for piece in held:
        state = optimizer.state[piece.flat]
        for slot in slots.get(piece.name, []):
            name = f"optim.{piece.name}.{slot}"
            if checkpoint.shape(name) != piece.shape:
                state[slot] = checkpoint.read(name).to(piece.flat.device)
                continue
            if slot not in state:
                state[slot] = torch.zeros_like(piece.flat, dtype=checkpoint.dtype(name), requires_grad=False)
            piece.of(state[slot]).copy_(checkpoint.read_range(name, piece.offset, piece.offset + piece.length))
