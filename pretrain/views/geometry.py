"""Crops and resizes on uint8 pixels: given the random numbers, a pure function.

torchvision's uint8 resize on a channels-last view of the decoded array (its SIMD path; no copy of the crop is made)
is several times faster than Pillow's and, with the two passes in Pillow's order, within 0.01 of 255 in the mean. Normalisation to floats is not here:
batches stay uint8 and are normalised on the device.

The crop parameters have the distribution of torchvision's `RandomResizedCrop.get_params` (ten tries, then a centre
crop), but come from uniforms that the caller draws, a fixed number a view, so that a crop can be made again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pretrain.views.spec import ImageView

TRIES = 10
UNIFORMS = 2 * TRIES + 3  # (area, ratio) of every try, then top, left, flip


class Box(NamedTuple):
    top: int
    left: int
    height: int
    width: int


def crop_box(height: int, width: int, view: ImageView, u: np.ndarray) -> Box:
    """The box of a random resized crop in an image of height x width, from `UNIFORMS` numbers u in [0, 1)."""
    numbers = u.tolist()
    log_low, log_high = math.log(view.ratio[0]), math.log(view.ratio[1])
    for area, ratio in zip(numbers[0 : 2 * TRIES : 2], numbers[1 : 2 * TRIES : 2]):
        target = height * width * (view.scale[0] + area * (view.scale[1] - view.scale[0]))
        aspect = math.exp(log_low + ratio * (log_high - log_low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = numbers[2 * TRIES], numbers[2 * TRIES + 1]
            return Box(int(top * (height - h + 1)), int(left * (width - w + 1)), h, w)
    return _centre_box(height, width, view.ratio)


def _centre_box(height: int, width: int, ratio: tuple[float, float]) -> Box:
    """The largest centred box whose width : height is within `ratio`."""
    h, w = height, width
    if width / height < ratio[0]:
        h = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = max(1, min(width, round(height * ratio[1])))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def resize_box(image: np.ndarray, box: Box, size: int) -> torch.Tensor:
    """The box of an (H, W, 3) uint8 image, resized (bicubic, antialiased) to uint8 (3, size, size)."""
    crop = image[box.top : box.top + box.height, box.left : box.left + box.width]
    pixels = torch.from_numpy(crop).permute(2, 0, 1)
    if _rows_first(box, size):
        pixels = _resize(pixels, [size, box.width])
    return _resize(pixels, [size, size])


def _rows_first(box: Box, size: int) -> bool:
    """Whether Pillow 13 shrinks the height before the width (earlier ones and torch never do).

    The passes round to whole levels in between, so their order shows: 0.25 of 255 in the mean, up to 10 at edges
    where the bicubic overshoot is clipped. Measured on Pillow 13.0, all sizes from 20 to 700 pixels.
    """
    return box.height > size and box.height - size > 2 * (box.width - size)


def _resize(pixels: torch.Tensor, size: list[int]) -> torch.Tensor:
    return F.resize(pixels, size, InterpolationMode.BICUBIC, antialias=True)


def random_resized_crop(image: np.ndarray, view: ImageView, u: np.ndarray) -> torch.Tensor:
    """One view of an (H, W, 3) uint8 image: contiguous uint8 (3, S, S); `u` holds `UNIFORMS` numbers in [0, 1)."""
    crop = resize_box(image, crop_box(*image.shape[:2], view, u), view.size)
    flipped = crop.flip(-1) if u[-1] < view.flip else crop
    return flipped.contiguous()


def eval_crop(image: np.ndarray, size: int) -> torch.Tensor:
    """open_clip's evaluation view: shortest side to `size` (bicubic), centre crop; contiguous uint8 (3, S, S)."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    return F.center_crop(_resize(pixels, [size]), [size, size]).contiguous()
