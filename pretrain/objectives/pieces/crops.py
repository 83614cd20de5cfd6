"""Random crops as recipes write them: how many, how large, which share of the image, and how their colours change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from pretrain.objectives.base import ObjectiveOptions
from pretrain.views.spec import Blur, ImageView, Jitter

Crops = tuple[int, int | None, tuple[float, float]]
"""(how many, side in pixels or null for the trunk's, share of the image's area from … to)."""


class ViewOptions(ObjectiveOptions):
    """What objectives on augmented views have in common; the defaults are SwAV's (and SimCLR's at strength 1)."""

    flip: float = Field(default=0.5, ge=0, le=1)
    jitter: tuple[float, float, float, float] | None = (0.8, 0.8, 0.8, 0.2)
    """Strength of brightness, contrast, saturation and hue; null: none."""
    jitter_p: float = Field(default=0.8, ge=0, le=1)
    grey: float = Field(default=0.2, ge=0, le=1)
    """Chance of a grey view."""
    blur: float = Field(default=0.5, ge=0, le=1)
    """Chance of a Gaussian blur."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Radius of the blur from … to, pixels of the view."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def view(
        self, name: str, size: int, scale: tuple[float, float], *, blur: float | None = None, solarize: float = 0.0
    ) -> ImageView:
        """One crop; `blur` in place of the options' chance."""
        chance = self.blur if blur is None else blur
        return ImageView(
            name,
            size,
            scale=scale,
            flip=self.flip,
            interpolation=self.interpolation,
            jitter=Jitter(*self.jitter, p=self.jitter_p) if self.jitter else None,
            grey=self.grey,
            blur=Blur(chance, self.sigma) if chance else None,
            solarize=solarize,
        )


def counted(crops: Sequence[Crops], size: int) -> list[tuple[int, tuple[float, float]]]:
    """(side, scale) of every single crop, in order; `size` is the trunk's."""
    return [(side or size, scale) for count, side, scale in crops for _ in range(count)]
