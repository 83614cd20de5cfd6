"""Is this an image, and of which kind: from its header, without decoding it.

A file cut short shows at its end, where the format's end mark is missing; only such a file is decoded to
know.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

from PIL import Image

EXTENSION = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif",
    "PPM": "ppm",
}  # fmt: skip
TAIL = 65536  # cameras and phones append data after a JPEG's end mark


class BadImage(Exception):
    """Not an image that can be trained on; `reason` is one of a few, `detail` is its own."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def image_extension(
    data: bytes, *, max_pixels: int, decode: Callable[[bytes], object], always_decode: bool = False
) -> str:
    """The extension of an image's true format, whatever its file is called; BadImage where there is none.

    `decode` makes the pixels or raises BadImage; it is called for images that look cut, or for all.
    """
    if not data:
        raise BadImage("zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                kind, (width, height) = image.format or "", image.size
    except Image.UnidentifiedImageError:
        raise BadImage("not an image", f"{len(data)} bytes that begin {data[:8]!r}") from None
    except Image.DecompressionBombError as error:
        raise BadImage("image bomb", str(error)) from None
    except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, ValueError, struct.error and others
        raise BadImage("unreadable image", str(error)) from error
    if kind not in EXTENSION:
        raise BadImage("unknown image format", f"{kind}: convert it to JPEG, PNG or WebP")
    if width * height > max_pixels:
        raise BadImage("image bomb", f"{width} x {height} pixels, more than {max_pixels:,}")
    if always_decode or looks_cut(data, EXTENSION[kind]):
        decode(data)
    return EXTENSION[kind]


def looks_cut(data: bytes, extension: str) -> bool:
    """Whether the end mark of a JPEG, PNG or WebP is not where it should be."""
    if extension == "jpg":
        return b"\xff\xd9" not in data[-TAIL:]
    if extension == "png":
        return b"IEND" not in data[-TAIL:]
    if extension == "webp":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return False
