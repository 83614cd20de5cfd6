"""Bytes of an image file -> RGB pixels, or a named reason why not.

JPEG goes to simplejpeg (full decode, releases the GIL, pixels within rounding of Pillow's); whatever it does
not take (CMYK and Adobe JPEG, files with recoverable errors, every other format, whatever the file is called)
goes to Pillow. Rules, the same as open_clip's loader unless said:

* colours as `Image.convert("RGB")`: grey is repeated, alpha is dropped (not composited), CMYK converted;
* palettes are converted before any resize (open_clip resizes palette images by nearest neighbour first);
* 16-bit grey keeps its upper byte (open_clip clips it to white);
* an EXIF orientation and an ICC profile are ignored, so that training sees the pixels other trainers see;
* an animation gives its first frame.

The header is checked before pixels are made: an image of more than `max_pixels` is refused, not decoded.
"""

from __future__ import annotations

import io
import threading

import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 50_000_000
SCRATCH_BYTES = 16 << 20
# what photographs come in; of the others that Pillow opens some run programs (EPS): data is not trusted
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
_JPEG = b"\xff\xd8\xff"
_SIMPLE = ("YCbCr", "Gray")  # what libjpeg-turbo converts to RGB by itself; CMYK and YCCK are Pillow's


class DamagedSample(Exception):
    """A sample that cannot be used; `reason` says why, in words for a log."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Scratch(threading.local):
    """Memory that a thread decodes into again and again: fresh pages cost a tenth of a decode.

    Kept up to SCRATCH_BYTES a thread; larger images get memory of their own.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def room(self, size: int) -> np.ndarray:
        """At least `size` bytes, of this thread's alone."""
        if size > SCRATCH_BYTES:
            return np.empty(size, np.uint8)
        if len(self._memory) < size:
            self._memory = np.empty(min(2 * size, SCRATCH_BYTES), np.uint8)
        return self._memory


def decode(data: bytes | memoryview, *, max_pixels: int = MAX_PIXELS, scratch: Scratch | None = None) -> np.ndarray:
    """RGB pixels (H, W, 3) uint8 of an encoded image; DamagedSample where there are none to be had.

    Pixels decoded with `scratch` are good until the same thread's next decode with it.
    """
    if len(data) == 0:
        raise DamagedSample("image is empty: 0 bytes")
    if data[:3] == _JPEG:
        pixels = _decode_jpeg(data, max_pixels, scratch)
        if pixels is not None:
            return pixels
    return _decode_pillow(data, max_pixels)


def _decode_jpeg(data: bytes | memoryview, max_pixels: int, scratch: Scratch | None) -> np.ndarray | None:
    """Pixels of a plain JPEG; None where Pillow should have its say."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in _SIMPLE:
            return None
        _refuse_bomb(width, height, max_pixels)
        room = scratch.room(3 * height * width) if scratch else None
        return simplejpeg.decode_jpeg(data, "RGB", buffer=room)
    except ValueError:  # strict: also raised for errors that libjpeg recovers from
        return None


def _decode_pillow(data: bytes | memoryview, max_pixels: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_bomb(*image.size, max_pixels)
            return np.array(_to_rgb(image))
    except Image.UnidentifiedImageError:
        raise DamagedSample(f"not an image of a known kind: {len(data)} bytes that begin {bytes(data[:8])!r}") from None
    except Image.DecompressionBombError:
        raise DamagedSample(f"image bomb: more pixels than Pillow opens, max_pixels {max_pixels:,}") from None
    except (DamagedSample, MemoryError):
        raise
    except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, ValueError, struct.error and others
        raise DamagedSample(f"image cannot be decoded: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise DamagedSample("image of floats: the range of its pixels is not known")
    if image.mode == "I" or image.mode.startswith("I;16"):
        upper = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(upper.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _refuse_bomb(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DamagedSample(f"image bomb: {width} x {height} pixels, more than max_pixels {max_pixels:,}")
