"""The member `roi.npy`: what a detector found in an image, a float16 row a region, its features and its box.

The last four columns are the box, (x1, y1, x2, y2) in shares of the whole image. Rows are the best scored first.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.lib import format as npy

MEMBER = "roi.npy"
BOX = 4  # columns


def read_rows(data: bytes | memoryview, columns: int) -> np.ndarray:
    """(n, columns) float16; ValueError where the member is anything else, or holds NaN or infinity.

    The header is read before anything is made of it, and an array is a view of `data`: a header that announces more
    than is there costs nothing.
    """
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, kind = header(file)
    except Exception as error:  # the header is parsed as Python: SyntaxError, TokenError, RecursionError and others
        raise ValueError(f"not an array of numpy's .npy form: {type(error).__name__}: {error}") from None
    if kind != np.float16 or fortran or len(shape) != 2 or shape[1] != columns:
        raise ValueError(f"an array of {shape} {kind}, should be (n, {columns}) float16, row after row")
    if len(data) - file.tell() != shape[0] * columns * kind.itemsize:
        raise ValueError(f"{len(data) - file.tell():,} bytes of numbers, not the {shape} float16 of its header")
    rows = np.frombuffer(data, kind, offset=file.tell()).reshape(-1, columns)
    if not np.isfinite(rows).all():
        raise ValueError("holds numbers that are not finite")
    return rows


def rows_bytes(rows: np.ndarray) -> bytes:
    """The member's bytes; `rows` (n, features + 4) float16."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(rows, np.float16), allow_pickle=False)
    return file.getvalue()
