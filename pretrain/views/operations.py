"""Photometric operations on float pixels, each as Pillow and torchvision make it, for one row or a batch.

Every operation takes contiguous (R, 3, S, S) float32 from 0 to 255, overwrites it, and returns the result. A
parameter is one number, with R = 1, or a (R, 1, 1, 1) tensor. Numbers are for CPUs: a row at a time stays in cache,
and its factor goes into the kernel as a constant. Tensors are for GPUs: all rows at once, and nothing waits for
the device.

Pillow keeps whole levels between operations and cuts fractions off; here fractions stay, and half a level is taken
off where Pillow takes half a level off in the mean. No random number is drawn here.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Number = float | Tensor
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # Pillow's, in whole 65536ths
CUT = 0.499  # what cutting off fractions takes, in the mean; a hair less, so that whole levels stay what they are
BLOCK = 56  # lines blurred at once on a CPU: a band matrix is mostly zeros, small blocks of it are not


def brightness(x: Tensor, factor: Number) -> Tensor:
    """Between black (0), itself (1) and beyond."""
    return _blend(x, _cut(x.device), factor)


def contrast(x: Tensor, factor: Number) -> Tensor:
    """Between the mean of its grey image, in whole levels, and itself."""
    means = x.mean((2, 3))
    if isinstance(factor, float):
        level = math.floor(sum(w * m for w, m in zip(LUMA, means[0].tolist())) + 0.5)
        return _blend(x, torch.full((1,), (1 - factor) * level - CUT), factor)
    levels = means.mv(_luma(x.device)).add_(0.5).floor_().view(-1, 1, 1, 1)
    return _blend(x, levels.mul_(1 - factor).sub_(CUT), factor)


def saturation(x: Tensor, factor: Number) -> Tensor:
    """Between its grey image and itself."""
    other = grey(x)
    if isinstance(factor, float):
        torch.add(_cut(x.device), other, alpha=1 - factor, out=other)
    else:
        other.mul_(1 - factor).sub_(CUT)
    return _blend(x, other, factor)


def grey(x: Tensor) -> Tensor:
    """(R, 1, S, S): its grey image; `x` stays as it is."""
    return torch.matmul(_luma(x.device), x.flatten(2)).view(len(x), 1, *x.shape[2:])


def hue(x: Tensor, turn: Number) -> Tensor:
    """Every colour's hue turned by `turn` of the circle; the largest and the smallest channel keep their values.

    With high, low and chroma of a pixel, t = chroma * (hue - 3), hue from 0 to 6, is linear in the channels; a
    channel is high within 1 of its own hue, low beyond 2, and linear in between. So no division and no cases.
    """
    red, green, blue = x.split(1, 1)
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = high - low
    t = (red - green).sub_(blue).add_(high).add_(chroma).copysign_(blue - green)
    torch.addcmul(t, chroma, _places(turn, x.device), out=x)
    x.abs_().sub_(3 * chroma).abs_()
    torch.sub(chroma.add_(high), x, out=x)
    return torch.clamp(x, low, high, out=x)


def solarize(x: Tensor) -> Tensor:
    """Levels from 128 on are inverted."""
    return torch.minimum(x, 255 - x, out=x)


class Box(NamedTuple):
    """The box that blurs three times in place of a Gaussian: whole pixels beside the middle, and a part of the next."""

    whole: int
    part: float


def box(sigma: float) -> Box:
    """Pillow's box for a Gaussian of `sigma` pixels (Gwosdek et al., "Theoretical Foundations of Gaussian
    Convolution by Extended Box Filtering", 2011)."""
    variance = sigma * sigma / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    return Box(whole, part)


def blur(x: Tensor, boxes: list[Box]) -> Tensor:
    """Pillow's Gaussian blur with each row's box, all of one `whole`; x is (R, 1 or 3, S, S), edges are repeated."""
    rows, channels, size, _ = x.shape
    starts, reads, lines = _blocks(size, boxes[0].whole, BLOCK if x.device.type == "cpu" else size)
    matrices = _matrices(boxes, size, x.device)
    across, down = torch.empty_like(x), matrices.repeat_interleave(channels, 0) if rows > 1 else matrices
    wide, tall = (a.view(rows, channels * size, size) for a in (x, across))
    for i, (start, read) in enumerate(zip(starts, reads)):
        band = matrices[:, i].mT
        torch.bmm(wide[:, :, read : read + band.shape[1]], band, out=tall[:, :, start : start + lines])
    planes, out = across.flatten(0, 1), x.view(rows * channels, size, size)
    for i, (start, read) in enumerate(zip(starts, reads)):
        band = down[:, i].expand(rows * channels, -1, -1)
        torch.bmm(band, planes[:, read : read + band.shape[2]], out=out[:, start : start + lines])
    return x


def _blend(x: Tensor, other: Tensor, factor: Number) -> Tensor:
    """factor * x + other, kept within 0 to 255; `other` is multiplied by 1 - factor already, and cut."""
    if isinstance(factor, float):
        torch.add(other, x, alpha=factor, out=x)
    else:
        x.mul_(factor).add_(other)
    return x.clamp_(0, 255)


@lru_cache(maxsize=8)
def _cut(device: torch.device) -> Tensor:
    return torch.full((1,), -CUT, device=device)


@lru_cache(maxsize=8)
def _luma(device: torch.device) -> Tensor:
    return torch.tensor(LUMA, device=device)


def _places(turn: Number, device: torch.device) -> Tensor:
    """(R, 3, 1, 1): what brings t to each channel's own place on the circle, -3 to 3."""
    if isinstance(turn, float):
        return host_tensor([(6 * turn - own + 3) % 6 - 3 for own in (0, 2, 4)], device).view(1, 3, 1, 1)
    own = torch.arange(0, 6, 2, device=device).view(1, 3, 1, 1)
    return (6 * turn - own + 3).remainder_(6).sub_(3)


@lru_cache(maxsize=64)
def _blocks(size: int, whole: int, block: int) -> tuple[list[int], list[int], int]:
    """First line written and first line read of each block, and the lines a block writes."""
    count = max(1, size // block)
    lines = -(-size // count)
    reach = 3 * (whole + 1)
    width = min(size, lines + 2 * reach)
    starts = [min(i * lines, size - lines) for i in range(count)]
    return starts, [min(max(0, start - reach), size - width) for start in starts], lines


def _matrices(boxes: list[Box], size: int, device: torch.device) -> Tensor:
    """(R, blocks, lines, width): the blocks of each row's blurring matrix, from the powers of its box's part."""
    powers = _powers(size, boxes[0].whole, BLOCK if device.type == "cpu" else size, device)
    scale = [(1 / (2 * whole + 1 + 2 * part)) ** 3 for whole, part in boxes]
    factors = [[s, s * b.part, s * b.part**2, s * b.part**3] for s, b in zip(scale, boxes)]
    return torch.mm(host_tensor(factors, device), powers.view(4, -1)).view(len(boxes), *powers.shape[1:])


@lru_cache(maxsize=64)
def _powers(size: int, whole: int, block: int, device: torch.device) -> Tensor:
    """(4, blocks, lines, width): (inner + part * outer) cubed, by powers of `part`, its edge pixels repeated."""
    inner, outer = np.zeros((size, size)), np.zeros((size, size))
    line = np.arange(size)
    for step in range(-whole, whole + 1):
        np.add.at(inner, (line, (line + step).clip(0, size - 1)), 1)
    for step in (-whole - 1, whole + 1):
        np.add.at(outer, (line, (line + step).clip(0, size - 1)), 1)
    none, cubed = np.zeros((size, size)), [np.eye(size)]
    for _ in range(3):
        cubed = [a + b for a, b in zip([*(m @ inner for m in cubed), none], [none, *(m @ outer for m in cubed)])]
    starts, reads, lines = _blocks(size, whole, block)
    width = min(size, lines + 6 * (whole + 1))
    blocks = [[m[s : s + lines, r : r + width] for s, r in zip(starts, reads)] for m in cubed]
    return torch.from_numpy(np.array(blocks, np.float32)).to(device)


def host_tensor(values: list, device: torch.device, dtype: type = np.float32) -> Tensor:
    """A tensor of numbers known on the host; the copy to a GPU waits for nothing."""
    tensor = torch.from_numpy(np.array(values, dtype))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
