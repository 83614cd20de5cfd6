"""From a sample's members to what every sample must have: image bytes, one caption, a class number.

A sample that lacks what was asked, or holds it unreadable, raises DamagedSample with the reason. Members by
the WebDataset convention: `key.jpg` (or another of IMAGE_EXTENSIONS), `key.txt` with one caption a line (a
newline inside a caption written as backslash n), `key.cls` with the class number. What a sample need not have is in
`pretrain.reader.fields`.
"""

from __future__ import annotations

from collections.abc import Mapping

from pretrain.shards.entries import IMAGE_EXTENSIONS, image_part, read_captions
from pretrain.shards.labels import CLASS_EXTENSION, NO_LABEL, class_number
from pretrain.views.decode import DamagedSample


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
    found = read_lines(members[extension], extension)
    if not found:
        raise DamagedSample(f"no caption: .{extension} is empty")
    return found


def read_lines(member: memoryview, extension: str) -> list[str]:
    """The lines of a text that are not blank; DamagedSample where it is not UTF-8."""
    try:
        return read_captions(bytes(member))
    except UnicodeDecodeError as error:
        raise DamagedSample(f"caption is not UTF-8 (.{extension}, byte {error.start})") from None


def label(members: Mapping[str, memoryview]) -> int:
    """The class number, NO_LABEL where the sample has none."""
    if CLASS_EXTENSION not in members:
        return NO_LABEL
    text = bytes(members[CLASS_EXTENSION])
    number = class_number(text)
    if number is None:
        raise DamagedSample(f"class is not a number: .cls holds {text.strip()[:20]!r}")
    return number
