"""Optimizer state by parameter name: ``PREFIX.<parameter>.<slot>``, whatever order or grouping the optimizer has."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pretrain.checkpoint import Checkpoint


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
    slots: dict[str, list[str]] = {}
    for full_name in checkpoint.names():
        if full_name.startswith(f"{prefix}."):
            name, slot = full_name.removeprefix(f"{prefix}.").rsplit(".", 1)
            slots.setdefault(name, []).append(slot)
    for name, parameter in parameters.items():
        state = {slot: checkpoint.read(f"{prefix}.{name}.{slot}") for slot in slots.get(name, [])}
        optimizer.state[parameter] = {slot: _placed(value, parameter) for slot, value in state.items()}


def _placed(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """On the parameter's device and, where it has its shape, in its memory layout: fused kernels walk raw memory."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
