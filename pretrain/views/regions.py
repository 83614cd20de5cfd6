"""Regions of an image: objects' boxes in a crop's coordinates, or what a detector stored of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Regions(NamedTuple):
    """b rows of regions, as the image tower reads them; rows without any are wholly masked."""

    boxes: Tensor
    """(b, M, 4) float32 x1, y1, x2, y2 as shares of the crop they are cut from; zeros where masked."""
    features: Tensor
    """(b, M, stored_dim + 4) float16 as stored by a detector; (b, M, 0) where regions are cut from the crop."""
    mask: Tensor
    """(b, M) bool: there is a region."""
