"""What an importer hands to the packer: where each image lies and what goes beside it, nothing read yet."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "png", "webp", "jpe", "jfif", "gif", "bmp", "tif", "tiff", "ppm", "pgm",
)  # fmt: skip
"""In the order in which a sample with several images is asked for one."""
MAX_KEY = 80  # bytes: key and extension fit the 100 of a plain tar header


def image_part(parts: Collection[str]) -> str | None:
    """The extension of a sample's image among those of its parts; None where it has no image."""
    return next((extension for extension in IMAGE_EXTENSIONS if extension in parts), None)


@dataclass(frozen=True, slots=True)
class Ref:
    """Bytes of a file, or of a member inside a tar."""

    path: Path
    offset: int = 0
    size: int | None = None  # None: to the file's end

    def read(self) -> bytes:
        if self.path.exists() and not self.path.is_file():
            raise OSError(f"{self.path} is no file")  # a pipe or /dev/zero would be read for ever
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample to be: `name` is the image's path as the input names it, `parts` what else it has, by
    extension."""

    name: str
    image: Ref
    parts: dict[str, bytes | Ref] = field(default_factory=dict)


class Skip(NamedTuple):
    """Something of the input that is not packed. `reason` is one of a few (they are counted), `detail` is its
    own."""

    name: str
    reason: str
    detail: str = ""


@dataclass
class Listing:
    """All of an input. `classnames[i]` is the name of label i; empty where there are no labels."""

    format: str
    entries: list[Entry] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    classnames: list[str] = field(default_factory=list)


def printable(name: str) -> str:
    """A file name with bytes that are not UTF-8 shown as ``\\xNN``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def caption_problem(caption: str) -> str | None:
    """Why a caption cannot be used, or None."""
    if not caption.strip():
        return "empty caption"
    try:
        caption.encode()
    except UnicodeEncodeError:  # lone surrogates stand for bytes that are no UTF-8
        return "caption not UTF-8"
    return None


def caption_lines(captions: Sequence[str]) -> bytes:
    """Captions one a line, a line break inside one written as backslash n (CLIP_benchmark's layout)."""
    return "\n".join("\\n".join(caption.strip().splitlines()) for caption in captions).encode()


def read_captions(text: bytes) -> list[str]:
    """What `caption_lines` wrote; blank lines are none. UnicodeDecodeError where it is not UTF-8."""
    lines = [line.strip().replace("\\n", "\n") for line in text.decode("utf-8").removeprefix("\ufeff").split("\n")]
    return [line for line in lines if line]


def json_bytes(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False).encode()


def hash_of(*parts: object) -> str:
    """16 hex digits that depend on the parts alone: the same on every machine."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def is_image_name(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def safe_key(name: str) -> str:
    """A tar key made of an image's path: letters and digits of any script, ``_`` and ``-`` stay; ``/``
    becomes ``-``; all else, dots and spaces too, becomes ``_``. Unicode is composed (NFC). At most 80 bytes
    of UTF-8."""
    stem = name.rpartition(".")[0] if is_image_name(name) else name
    stem = unicodedata.normalize("NFC", stem.strip("/")).replace("/", "-")
    key = "".join(c if c.isalnum() or c in "_-" else "_" for c in stem) or "_"
    return key if len(key.encode()) <= MAX_KEY else _marked(key, hash_of(name))


def _marked(key: str, digest: str) -> str:
    """The key with 8 digits behind it, cut to 80 bytes."""
    return key.encode()[: MAX_KEY - 9].decode(errors="ignore") + "-" + digest[:8]


def assign_keys(names: Iterable[str]) -> dict[str, str]:
    """A key for each name, all different: of names that give one key, the first in sorted order has it plain,
    the others get 8 hex digits of their name's hash behind it."""
    keys: dict[str, str] = {}
    taken: set[str] = set()
    for name in sorted(set(names)):
        key = plain = safe_key(name)
        salt = 0
        while key in taken:
            key = _marked(plain, hash_of(name, salt))
            salt += 1
        taken.add(key)
        keys[name] = key
    return keys
