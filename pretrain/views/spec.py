"""What an objective asks of a sample: crops of its image, one of its captions.

A view is a request, not code: the reader makes the union of what all objectives ask for, decodes the image
once and cuts every crop from it. A view's random numbers are keyed by its name, so adding a view never
changes another one's crops. Photometric changes (jitter, grey, blur) are not here: they run batched on the
device.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageView:
    """One random resized crop of the image, `size` x `size` pixels, uint8.

    `scale` is the share of the image's area the crop covers, `ratio` its width : height, `flip` the chance of
    a left-right flip. The defaults are open_clip's training crop.
    """

    name: str
    size: int
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"view {self.name!r}: size {self.size} must be at least 1 pixel")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"view {self.name!r}: scale {self.scale} must be (low, high) with 0 < low <= high")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"view {self.name!r}: ratio {self.ratio} must be (low, high) with 0 < low <= high")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"view {self.name!r}: flip {self.flip} must be a chance between 0 and 1")


@dataclass(frozen=True)
class TextView:
    """One of the sample's captions: a line of its `extension` member, drawn anew every epoch."""

    name: str = "caption"
    extension: str = "txt"
