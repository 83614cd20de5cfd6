"""Regions of an image: objects' boxes in a crop's coordinates, or what a detector stored of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from pretrain.views.geometry import Box

SHOWN = 0.5 - 1e-9  # the share of a region's area that its crop must show: exactly half, as it is rounded, will do


class Regions(NamedTuple):
    """b rows of regions, as the image tower reads them; rows without any are wholly masked."""

    boxes: Tensor
    """(b, M, 4) float32 x1, y1, x2, y2 as shares of the crop they are cut from; zeros where masked, and where there
    are features, which know no crop."""
    features: Tensor
    """(b, M, stored_dim + 4) float16 as stored by a detector; (b, M, 0) where regions are cut from the crop."""
    mask: Tensor
    """(b, M) bool: there is a region."""


def in_crop(boxes: np.ndarray, height: int, width: int, crop: Box, *, flipped: bool) -> np.ndarray:
    """Boxes (n, 4) in shares of a height x width image -> (m, 4) in shares of its crop, clipped to it, in order.

    Boxes of which the crop shows less than half are left out: m <= n. `flipped`: left and right change places.
    """
    scale, start = np.array([width, height]), np.array([crop.left, crop.top])
    corners = (boxes.reshape(-1, 2, 2) * scale - start) / np.array([crop.width, crop.height])
    clipped = corners.clip(0, 1)
    clipped = clipped[_areas(clipped) >= SHOWN * _areas(corners)]
    if flipped:
        clipped[..., 0] = 1 - clipped[:, ::-1, 0]
    return clipped.reshape(-1, 4)


def _areas(corners: np.ndarray) -> np.ndarray:
    """(n, 2 corners, x and y) -> (n,)"""
    return (corners[:, 1] - corners[:, 0]).prod(axis=1)
