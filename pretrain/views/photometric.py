"""Photometric changes of whole batches of crops: jitter, grey, blur, solarise, in the order of SwAV and DINO.

`draw` makes every row's parameters on the host, keyed by the sample and the view; `apply` makes the changes where
the pixels are. As the host knows which row gets what, no row pays for a change it does not get, and nothing waits for
the device. On a CPU rows go one at a time: each stays in cache, and its result does not depend on the rows beside it.
On any other device the rows that get the same change at the same place go together.

The operations are in `pretrain.views.operations`. Crops and flips are made before, by `pretrain.views.geometry`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from pretrain.philox import uniforms
from pretrain.views import operations
from pretrain.views.operations import host_tensor
from pretrain.views.spec import ImageView

JITTER = (operations.brightness, operations.contrast, operations.saturation, operations.hue)
UNIFORMS = 13  # jitter, order of four, strength of four, grey, blur, sigma, solarise
ROWS_AT_ONCE = 256  # on a GPU: bounds the float pixels in flight, 3 times 154 MB at 224


@dataclass(frozen=True)
class Draws:
    """What each of b rows gets; indexed by a slice or by row numbers."""

    order: np.ndarray
    """(b, 4) int: which of JITTER comes first, second, third and last; -1 for none."""
    strength: np.ndarray
    """(b, 4) float: factors of brightness, contrast and saturation, turn of the hue in circles."""
    grey: np.ndarray
    """(b,) bool"""
    sigma: np.ndarray
    """(b,) float: of the blur, pixels; 0 for none."""
    solarize: np.ndarray
    """(b,) bool"""

    def __len__(self) -> int:
        return len(self.grey)

    def __getitem__(self, rows: slice | np.ndarray) -> Draws:
        return Draws(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def any(self) -> np.ndarray:
        """(b,) bool: the rows that change at all."""
        return (self.order >= 0).any(1) | self.grey | (self.sigma > 0) | self.solarize


def draw(view: ImageView, seed: int, epoch: np.ndarray, source: np.ndarray, ids: np.ndarray) -> Draws:
    """Every row's parameters, from numbers of their own: a view's crops do not depend on its photometrics."""
    return draws_from(view, uniforms(seed, epoch, source, ids, f"{view.name} photometric", UNIFORMS))


def draws_from(view: ImageView, u: np.ndarray) -> Draws:
    """Parameters from (b, UNIFORMS) numbers in [0, 1); distributed as torchvision's and SwAV's."""
    jitter, blur = view.jitter, view.blur
    order, strength = np.full((len(u), 4), -1), np.tile([1.0, 1.0, 1.0, 0.0], (len(u), 1))
    if jitter:
        bounds = [(max(0.0, 1 - s), 1 + s) for s in (jitter.brightness, jitter.contrast, jitter.saturation)]
        low, high = np.array([*bounds, (-jitter.hue, jitter.hue)]).T
        strength = low + u[:, 5:9] * (high - low)
        strength[:, 3] = np.trunc(strength[:, 3] * 255) / 255  # Pillow's circle has 255 places
        order = u[:, 1:5].argsort(axis=1)
        order[(u[:, 0] >= jitter.p)[:, None] | (low == high)[order]] = -1
    sigma = np.zeros(len(u))
    if blur:
        sigma = np.where(u[:, 10] < blur.p, blur.sigma[0] + u[:, 11] * (blur.sigma[1] - blur.sigma[0]), 0.0)
    return Draws(order, strength, u[:, 9] < view.grey, sigma, u[:, 12] < view.solarize)


def apply(pixels: Tensor, draws: Draws) -> Tensor:
    """The changed pixels, uint8 as given (b, 3, S, S), on their device; `pixels` itself is left alone."""
    if not draws.any().any():
        return pixels
    return _one_by_one(pixels, draws) if pixels.device.type == "cpu" else _together(pixels, draws)


def _one_by_one(pixels: Tensor, draws: Draws) -> Tensor:
    out = torch.empty_like(pixels)
    whole = zip(*(getattr(draws, f.name).tolist() for f in fields(draws)))
    for given, to, changing, (order, strength, grey, sigma, solarize) in zip(
        pixels.split(1), out.split(1), draws.any().tolist(), whole
    ):
        if not changing:
            to.copy_(given)
            continue
        x = given.float()
        for number in order:
            if number >= 0:
                JITTER[number](x, strength[number])
        if grey:
            x = operations.grey(x)  # one channel from here on: the blur costs a third
        if sigma:
            operations.blur(x, [operations.box(sigma)])
        if solarize:
            operations.solarize(x)
        to.copy_(x.add_(0.5).to(torch.int16))  # torch's direct conversion to uint8 is four times slower
    return out


def _together(pixels: Tensor, draws: Draws) -> Tensor:
    out = pixels.clone()
    changing = np.flatnonzero(draws.any())
    for rows in np.split(changing, range(ROWS_AT_ONCE, len(changing), ROWS_AT_ONCE)):
        index = host_tensor(rows.tolist(), pixels.device, np.int64)
        x, part = pixels[index].float(), draws[rows]
        for place in range(4):
            for number, operation in enumerate(JITTER):
                _on(x, part.order[:, place] == number, operation, part.strength[:, number])
        _on(x, part.grey, lambda some: operations.grey(some).expand_as(some))
        boxes = [operations.box(sigma) for sigma in part.sigma]
        for whole in {box.whole for box, sigma in zip(boxes, part.sigma) if sigma}:
            same = np.array([box.whole == whole for box in boxes]) & (part.sigma > 0)
            of = [box for box, chosen in zip(boxes, same) if chosen]
            _on(x, same, lambda some, of=of: operations.blur(some, of))
        _on(x, part.solarize, operations.solarize)
        out[index] = x.add_(0.5).to(torch.uint8)
    return out


def _on(x: Tensor, chosen: np.ndarray, operation: Callable[..., Tensor], values: np.ndarray | None = None) -> None:
    """Make the operation on the chosen rows of `x`, each with its value; one gather, one scatter."""
    if not chosen.any():
        return
    index = host_tensor(np.flatnonzero(chosen).tolist(), x.device, np.int64)
    column = () if values is None else (host_tensor(values[chosen].tolist(), x.device).view(-1, 1, 1, 1),)
    x[index] = operation(x[index], *column)
