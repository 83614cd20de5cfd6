"""What an objective asks of the trunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FeatureRequest:
    """One feature of one view; equal requests of several objectives are computed once."""

    tower: Literal["image", "text"]
    view: str
    """Name of the `ImageView` or `TextView` the tower reads."""
    output: Literal["embedding", "pooled"] = "embedding"
    """`embedding`: projected into the shared space, not normalised; `pooled`: before the projection."""
    from_layer: int | None = None
    """Tokens of this block instead of the tower's end."""
    teacher: bool = False
    """From the momentum teacher, without gradient."""
