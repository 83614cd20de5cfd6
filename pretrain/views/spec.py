"""What an objective asks of a sample: crops of its image, texts, regions.

A view is a request, not code: the reader makes the union of what all objectives ask for, decodes the image
once and cuts every crop from it. A view's random numbers are keyed by its name, so adding a view never
changes another one's crops. Photometric changes (jitter, grey, blur, solarise) are asked for here and made
batched on the device, by `pretrain.views.photometric`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Jitter:
    """torchvision's ColorJitter, with chance `p`: its four changes in random order, each row its own.

    A strength b of brightness, contrast or saturation draws a factor from [max(0, 1 - b), 1 + b]; `hue` draws a
    turn from [-hue, hue] of the colour circle, at most half of it.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    p: float = 0.8

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(f"jitter: {name} {getattr(self, name)} must not be negative")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"jitter: hue {self.hue} must lie between 0 and 0.5")
        _check_chance("jitter: p", self.p)


@dataclass(frozen=True)
class Blur:
    """Pillow's Gaussian blur, with chance `p`; its radius is drawn from `sigma`, pixels of the view."""

    p: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        _check_chance("blur: p", self.p)
        if not 0 < self.sigma[0] <= self.sigma[1]:
            raise ValueError(f"blur: sigma {self.sigma} must be (low, high) with 0 < low <= high")


@dataclass(frozen=True)
class ImageView:
    """One random resized crop of the image, `size` x `size` pixels, uint8.

    `scale` is the share of the image's area the crop covers, `ratio` its width : height, `flip` the chance of
    a left-right flip. The defaults are open_clip's training crop. `jitter`, `grey` (a chance), `blur` and
    `solarize` (a chance; threshold 128) follow in this order, as in SwAV and DINO.
    """

    name: str
    size: int
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    jitter: Jitter | None = None
    grey: float = 0.0
    blur: Blur | None = None
    solarize: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"view {self.name!r}: size {self.size} must be at least 1 pixel")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"view {self.name!r}: scale {self.scale} must be (low, high) with 0 < low <= high")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"view {self.name!r}: ratio {self.ratio} must be (low, high) with 0 < low <= high")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"view {self.name!r}: interpolation {self.interpolation!r} is not bicubic or bilinear")
        for name in ("flip", "grey", "solarize"):
            _check_chance(f"view {self.name!r}: {name}", getattr(self, name))

    @property
    def photometric(self) -> bool:
        """Whether any row of this view may have its colours or its sharpness changed."""
        jitter, blur = self.jitter, self.blur
        return bool((jitter and jitter.p) or self.grey or (blur and blur.p) or self.solarize)


@dataclass(frozen=True)
class TextView:
    """A text of the sample, drawn anew every epoch where there are several.

    A `line` is one caption of the member `extension`; `tags` names the objects that the member, JSON, lists
    ("attribute … label, …", the best scored first). A sample without a required text is damaged; without one that
    is not required, its row is absent: no token, and `Batch.present` says so.
    """

    name: str = "caption"
    extension: str = "txt"
    form: Literal["line", "tags"] = "line"
    required: bool = True
    after: int = 0
    """n: the n-th line after the one that is drawn, absent where there are no more: several captions of a sample."""

    @property
    def purpose(self) -> str:
        """What the draw is keyed by: views that differ in `after` alone share it."""
        return self.name.partition("+")[0]


@dataclass(frozen=True)
class RegionView:
    """Regions of the sample's image, the best scored first, at most `most`: objects' boxes, or stored features.

    Without `stored_dim`: boxes of the objects that the member `json` lists, brought into the crop that the image view
    `of` makes (its flip too), clipped to it; regions that it shows less than half of are left out. With it: the rows
    of the member `roi.npy`, a detector's `stored_dim` features and four numbers of the box, which know no crop.
    """

    name: str
    of: str
    most: int = 10
    stored_dim: int | None = None


def _check_chance(what: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"{what} {p} must be a chance between 0 and 1")
