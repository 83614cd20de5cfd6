"""Small JPEGs of all images of a segment in one flat file, found by row: `thumbs.bin` and `thumbs.npy`
(offsets).

One file instead of one a picture: millions of files make every file system slow, and a row number cannot name
a path outside the collection.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 160  # longest side, pixels
QUALITY = 80


def thumbnail(pixels: np.ndarray) -> bytes:
    """A JPEG of at most 160 × 160 pixels of an RGB image (H, W, 3) uint8."""
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def write_thumbs(folder: Path, jpegs: list[bytes]) -> None:
    offsets = np.cumsum([0, *map(len, jpegs)], dtype=np.int64)
    (folder / "thumbs.bin").write_bytes(b"".join(jpegs))
    np.save(folder / "thumbs.npy", offsets)


class Thumbs:
    """Thumbnails by row."""

    def __init__(self, folder: Path):
        self._offsets = np.load(folder / "thumbs.npy", allow_pickle=False)
        self._bytes = folder / "thumbs.bin"

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def read(self, row: int) -> bytes:
        """The JPEG of one row; IndexError outside."""
        if not 0 <= row < len(self):
            raise IndexError(f"thumbnail {row} of {len(self)}")
        start, stop = self._offsets[row : row + 2].tolist()
        with open(self._bytes, "rb") as file:
            file.seek(start)
            return file.read(stop - start)
