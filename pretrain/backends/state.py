"""Optimizer state by parameter name: ``PREFIX.<parameter>.<slot>``, whatever order or grouping the optimizer has."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pretrain.checkpoint import Checkpoint
from pretrain.distributed.shards import local, offset


def optimizer_tensors(
    prefix: str, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Every tensor the optimizer holds for these parameters."""
    return {
        f"{prefix}.{name}.{slot}": value
        for name, parameter in parameters.items()
        for slot, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer(
    prefix: str,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    checkpoint: Checkpoint,
) -> None:
    """Rebuild the state of `optimizer` from a checkpoint; parameters without any there start anew."""
    slots = stored_slots(prefix, checkpoint)
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {
            slot: _slot(parameter, checkpoint, f"{prefix}.{name}.{slot}") for slot in slots.get(name, [])
        }


def stored_slots(prefix: str, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The slots that a checkpoint holds of every parameter, by its name."""
    slots: dict[str, list[str]] = {}
    for full_name in checkpoint.names():
        if full_name.startswith(f"{prefix}."):
            name, slot = full_name.removeprefix(f"{prefix}.").rsplit(".", 1)
            slots.setdefault(name, []).append(slot)
    return slots


def _slot(parameter: nn.Parameter, checkpoint: Checkpoint, name: str) -> Tensor:
    """On the parameter's device and, where it has its shape, laid out as it is: fused kernels walk raw memory."""
    if checkpoint.shape(name) != parameter.shape:
        return checkpoint.read(name).to(parameter.device)
    value = torch.empty_like(parameter, dtype=checkpoint.dtype(name), requires_grad=False)
    fill(value, checkpoint, name)
    return value


@torch.no_grad()
def fill(tensor: Tensor, checkpoint: Checkpoint, name: str) -> None:
    """Copy the checkpoint's tensor into one of its shape; of a sharded one this rank's rows, and read no others."""
    if isinstance(tensor, DTensor):
        rows, start = local(tensor), offset(tensor)
        rows.copy_(checkpoint.read_range(name, start, start + rows.numel()).view_as(rows))
    else:
        tensor.copy_(checkpoint.read(name))
