"""What an objective asks of the trunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from pretrain.views.regions import Regions


@dataclass(frozen=True)
class FeatureRequest:
    """One feature of one view; equal requests of several objectives are computed once."""

    tower: Literal["image", "text"]
    view: str
    """Name of the `ImageView` or `TextView` the tower reads."""
    output: Literal["embedding", "pooled", "regions", "map"] = "embedding"
    """`embedding`: projected into the shared space, not normalised; `pooled`: before the projection; `regions`: the
    embedding of a `RegionView`'s regions alone, for which `view` names it; `map`: what regions are cut from."""
    from_layer: int | None = None
    """Tokens of this block instead of the tower's end."""
    teacher: bool = False
    """From the momentum teacher, without gradient."""


class RegionInput(NamedTuple):
    """What a request for `regions` reads."""

    regions: Regions
    of: str
    """Name of the image view whose map the regions are cut from."""
    images: Tensor
    """(b, 3, S, S) uint8: that view."""

    def take(self, rows: Tensor) -> RegionInput:
        """The rows of these numbers."""
        return self._replace(regions=Regions(*(part[rows] for part in self.regions)), images=self.images[rows])

    @property
    def cut(self) -> bool:
        """Whether regions are cut from the crop's map; else their features are stored."""
        return not self.regions.features.shape[2]

    @property
    def map_request(self) -> FeatureRequest:
        """The map that they are cut from."""
        return FeatureRequest("image", self.of, output="map")


class PooledInput(NamedTuple):
    """What a request for an image's `embedding` reads where its `pooled` features are known."""

    pooled: Tensor
    """(b, C)"""


Input = Tensor | RegionInput | PooledInput
"""What a request reads: pixels (b, 3, S, S) uint8 or tokens (b, L) int64, or one of the above."""
