"""A sample's texts, tags and regions, of which most may be missing.

What is malformed counts as missing and costs only itself: the sample is used, and `left_out` says what was wrong
with which member. Only a view that is required makes a sample without it damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from pretrain.reader.samples import captions, read_lines
from pretrain.shards import roi
from pretrain.shards.entries import IMAGE_EXTENSIONS
from pretrain.shards.labels import CLASS_EXTENSION
from pretrain.shards.objects import Found, SceneObject, read_objects, tags
from pretrain.views.decode import DamagedSample
from pretrain.views.spec import ImageView, RegionView, TextView

OBJECTS = "json"  # the member regions are read from
T = TypeVar("T")


def wanted_extensions(
    image_views: Sequence[ImageView], text_views: Sequence[TextView], region_views: Sequence[RegionView] = ()
) -> frozenset[str]:
    """The members that must be read for these views."""
    images = IMAGE_EXTENSIONS if image_views else ()
    regions = (OBJECTS if view.stored_dim is None else roi.MEMBER for view in region_views)
    return frozenset([*images, *(view.extension for view in text_views), *regions, CLASS_EXTENSION])


class Fields:
    """What one sample's members hold; `left_out` has the malformed ones asked for so far, and what is wrong."""

    def __init__(self, members: Mapping[str, memoryview]) -> None:
        self._members = members
        self._listed: dict[str, list[SceneObject]] = {}  # member -> its objects, which tags and regions both read
        self.left_out: dict[str, str] = {}

    def text(self, view: TextView, u: float) -> str | None:
        """The line of the view that u in [0, 1) falls on, or the one `after` it; None where the sample has none.

        DamagedSample where the view is required and the sample has no line at all.
        """
        lines = self._tags(view) if view.form == "tags" else self._lines(view)
        return lines[(int(u * len(lines)) + view.after) % len(lines)] if view.after < len(lines) else None

    def boxes(self) -> np.ndarray:
        """(n, 4) corners of the objects in shares of the image, the best scored first."""
        return np.array([o.box for o in self._objects(OBJECTS)], float).reshape(-1, 4)

    def stored(self, stored_dim: int) -> np.ndarray:
        """(n, stored_dim + 4) float16: what a detector stored of its regions."""
        columns = stored_dim + roi.BOX
        return self._read(roi.MEMBER, lambda data: roi.read_rows(data, columns), np.empty((0, columns), np.float16))

    def _lines(self, view: TextView) -> list[str]:
        if view.required:
            return captions(self._members, view.extension)
        return self._read(view.extension, lambda data: read_lines(data, view.extension), [])

    def _tags(self, view: TextView) -> list[str]:
        named = tags(self._objects(view.extension))
        if view.required and not named:
            reason = self.left_out.get(view.extension, f".{view.extension} lists no objects")
            raise DamagedSample(f"no tags: {reason}")
        return [named] if named else []

    def _objects(self, member: str) -> list[SceneObject]:
        if member not in self._listed:
            found = self._read(member, read_objects, Found([], []))
            if found.wrong:
                self.left_out[member] = f"{len(found.wrong)} of its objects: {found.wrong[0]}"
            self._listed[member] = found.objects
        return self._listed[member]

    def _read(self, member: str, read: Callable[[memoryview], T], nothing: T) -> T:
        if member not in self._members:
            return nothing
        try:
            return read(self._members[member])
        except (ValueError, DamagedSample) as error:
            self.left_out[member] = str(error)
            return nothing
