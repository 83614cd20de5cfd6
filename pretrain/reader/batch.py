"""What the reader gives a training step: pixels, tokens and labels of this rank's rows, and whether each
counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from pretrain.views.photometric import Draws, apply
from pretrain.views.regions import Regions


@dataclass
class Batch:
    """b rows of one step, on one rank. Images are uint8: they are normalised on the device.

    The reader gives crops as they were cut, and beside them what `to` is still to change of their colours.
    A damaged row has weight 0, the pixels and tokens of a good row, label -1, and keeps its own id and key.
    """

    step: int
    ids: torch.Tensor  # (b,) int64: places in their source's line; two sources may share them
    source: torch.Tensor  # (b,) int64
    epoch: torch.Tensor  # (b,) int64: of the source
    keys: list[str]
    weight: torch.Tensor  # (b,) float32: 1, or 0 for a damaged row
    labels: torch.Tensor  # (b,) int64: -1 where there is none
    images: dict[str, torch.Tensor]  # view -> (b, 3, S, S) uint8
    tokens: dict[str, torch.Tensor]  # view -> (b, context) int64
    captions: dict[str, list[str]]  # view -> the text that was drawn
    damaged: list[dict[str, Any]] = field(default_factory=list)
    """step, row, source, id, shard, key, reason; and `left_out` for a good row: the one member it goes without."""
    present: dict[str, torch.Tensor] = field(default_factory=dict)  # text or region view -> (b,) bool: the row has it
    regions: dict[str, Regions] = field(default_factory=dict)  # view -> (b, M, …)
    photometric: dict[str, Draws] = field(default_factory=dict)  # view -> changes to come; none for most views

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def uid(self) -> torch.Tensor:
        """(b,) int64: the same for two rows exactly when they are one sample, over all sources."""
        return self.source << 48 | self.ids

    def rows(self, lo: int, hi: int) -> Batch:
        """The micro-batch of rows lo to hi - 1; tensors are views, not copies."""
        part = {f.name: _cut(getattr(self, f.name), lo, hi) for f in fields(self) if f.name not in ("step", "damaged")}
        inside = [damage for damage in self.damaged if lo <= damage["row"] < hi]
        return Batch(self.step, damaged=[{**damage, "row": damage["row"] - lo} for damage in inside], **part)

    def to(self, device: torch.device | str) -> Batch:
        """What the towers see: the batch's tensors on `device`, and the photometric changes made there, once."""
        moved = {f.name: _move(getattr(self, f.name), device) for f in fields(self)}
        for name, draws in self.photometric.items():
            moved["images"][name] = apply(moved["images"][name], draws)
        return replace(self, **{**moved, "photometric": {}})


def _cut(value: Any, lo: int, hi: int) -> Any:
    if isinstance(value, dict):
        return {name: _cut(v, lo, hi) for name, v in value.items()}
    return Regions(*(v[lo:hi] for v in value)) if isinstance(value, Regions) else value[lo:hi]


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Regions):
        return Regions(*(_move(v, device) for v in value))
    return {name: _move(v, device) for name, v in value.items()} if isinstance(value, dict) else value
