"""From a sample's members to what the views ask for: image bytes, one caption, a class number.

A sample that lacks what was asked, or holds it unreadable, raises DamagedSample with the reason. Members by
the WebDataset convention: `key.jpg` (or another of IMAGE_EXTENSIONS), `key.txt` with one caption a line (a
newline inside a caption written as backslash n), `key.cls` with the class number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pretrain.shards.entries import IMAGE_EXTENSIONS, image_part
from pretrain.shards.labels import CLASS_EXTENSION, NO_LABEL, class_number
from pretrain.views.decode import DamagedSample
from pretrain.views.spec import ImageView, TextView


def wanted_extensions(image_views: Sequence[ImageView], text_views: Sequence[TextView]) -> frozenset[str]:
    """The members that must be read for these views."""
    images = IMAGE_EXTENSIONS if image_views else ()
    return frozenset([*images, *(view.extension for view in text_views), CLASS_EXTENSION])


def image_bytes(members: Mapping[str, memoryview]) -> memoryview:
    """The encoded image; where there are several, the first in the order of IMAGE_EXTENSIONS."""
    extension = image_part(members)
    if extension is None:
        raise DamagedSample(f"no image: the sample has no .{', .'.join(IMAGE_EXTENSIONS[:4])} nor another image")
    return members[extension]


def captions(members: Mapping[str, memoryview], extension: str) -> list[str]:
    """All captions of a sample, at least one."""
    if extension not in members:
        raise DamagedSample(f"no caption: the sample has no .{extension}")
    try:
        text = bytes(members[extension]).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedSample(f"caption is not UTF-8 (.{extension}, byte {error.start})") from None
    lines = [line.strip().replace("\\n", "\n") for line in text.removeprefix("\ufeff").split("\n")]
    found = [line for line in lines if line]
    if not found:
        raise DamagedSample(f"no caption: .{extension} is empty")
    return found


def draw_caption(members: Mapping[str, memoryview], extension: str, u: float) -> str:
    """One of the captions: the one that u in [0, 1) falls on."""
    found = captions(members, extension)
    return found[int(u * len(found))]


def label(members: Mapping[str, memoryview]) -> int:
    """The class number, NO_LABEL where the sample has none."""
    if CLASS_EXTENSION not in members:
        return NO_LABEL
    text = bytes(members[CLASS_EXTENSION])
    number = class_number(text)
    if number is None:
        raise DamagedSample(f"class is not a number: .cls holds {text.strip()[:20]!r}")
    return number
