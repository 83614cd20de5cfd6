"""The rows that are searched: one or several arrays in one line, checked once, read in blocks.

`Bank` holds numpy arrays (float32 in memory, or float16 memory maps of segments) and multiplies with faiss
and numpy; `index.search.device.DeviceBank` does the same with a tensor on a GPU. Both only make products:
which rows win is decided in `index.search.exact`. Rows are not copied.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from index.errors import BadInput
from index.search import kernels

BLOCK_ROWS = 16384  # 16 MiB of float32 at width 256: a block and its scores stay near the cache
GATHERED = 2**23  # float64 numbers gathered at once: 64 MiB
SAMPLED = 4  # rows looked at to see whether a known array was overwritten


class AnyBank(ABC):
    """Rows that can be searched: three products with queries (Q, D) float32, and what bounds their errors.

    Values are taken as float32, whatever they are stored as. `largest_norm` is the Euclidean length of the
    longest row, found by the pass that checks that all is finite.
    """

    rows: int
    dim: int
    largest_norm: float
    unit = 2.0**-24  # rounding of float32
    extra = 0.0  # relative error that cutting the factors to fewer bits adds

    @abstractmethod
    def candidates(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores, ids), each (Q, count): the best rows by float32 products, in no order, ties anyhow."""

    @abstractmethod
    def rescore(self, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Products of each query with the rows `ids` (Q, C), in float64, rounded to float32."""

    @abstractmethod
    def all_scores(self, queries: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, scores (Q, rows of a block)) over all blocks, as `rescore` makes them."""


class Bank(AnyBank):
    """Rows (N, D) in numpy arrays of one width, standing in one line.

    Raises `BadInput` when a part is not a float matrix, the widths differ, or a value is not finite.
    """

    def __init__(self, parts: Sequence[np.ndarray], largest_norm: float | None = None):
        if not parts:
            raise BadInput("bank: no array given; an empty bank is one of shape (0, dim)")
        for part in parts:
            check_matrix(part, "bank")
        widths = {p.shape[1] for p in parts}
        if len(widths) > 1:
            raise BadInput(f"bank: arrays of different widths {sorted(widths)} cannot stand in one line")
        self.parts = list(parts)
        self.dim = widths.pop()
        self.starts = [0, *itertools.accumulate(len(p) for p in parts)]
        self.rows = self.starts[-1]
        self.largest_norm = self._measure() if largest_norm is None else largest_norm

    def candidates(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        return kernels.best(queries, self._runs(), count)

    def rescore(self, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
        out = np.empty(ids.shape, np.float32)
        step = max(1, GATHERED // (ids.shape[1] * self.dim))
        for lo in range(0, len(ids), step):
            some = ids[lo : lo + step]
            rows = self._take(some.ravel()).reshape(*some.shape, self.dim)
            out[lo : lo + step] = np.einsum("qcd,qd->qc", rows, queries[lo : lo + step].astype(np.float64))
        return out

    def all_scores(self, queries: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        wide = queries.astype(np.float64)
        for start, block in self.blocks():
            yield start, (wide @ block.T.astype(np.float64)).astype(np.float32)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 block); what is float32 already is not copied."""
        for start, part in zip(self.starts, self.parts):
            for lo in range(0, len(part), BLOCK_ROWS):
                yield start + lo, np.ascontiguousarray(part[lo : lo + BLOCK_ROWS], np.float32)

    def _runs(self) -> Iterator[tuple[int, np.ndarray]]:
        """As `blocks`, but what needs no conversion comes whole: faiss makes its own blocks."""
        if all(p.dtype == np.float32 and p.flags.c_contiguous for p in self.parts):
            return ((start, part) for start, part in zip(self.starts, self.parts) if len(part))
        return self.blocks()

    def _take(self, ids: np.ndarray) -> np.ndarray:
        """Rows as float64 (M, D)."""
        if len(self.parts) == 1:
            return self.parts[0][ids].astype(np.float32, copy=False).astype(np.float64)
        out = np.empty((len(ids), self.dim), np.float64)
        part_of = np.searchsorted(self.starts, ids, side="right") - 1
        for i in np.unique(part_of):
            here = part_of == i
            out[here] = self.parts[i][ids[here] - self.starts[i]].astype(np.float32, copy=False)
        return out

    def _measure(self) -> float:
        largest = 0.0
        for start, block in self.blocks():
            squares = np.einsum("nd,nd->n", block, block)
            top = float(squares.max())
            if not math.isfinite(top):
                row = start + int(np.flatnonzero(~np.isfinite(squares))[0])
                raise BadInput(f"bank: row {row} is not finite, or too large for float32 products")
            largest = max(largest, top)
        return math.sqrt(largest)


_norms: dict[int, tuple[weakref.ref, object, float]] = {}
_norms_lock = threading.Lock()


def remembered(rows: np.ndarray, owner: object = None) -> Bank:
    """The bank of one array. That its rows are finite is remembered, so a second call costs nothing.

    `owner`: what the caller holds, when `rows` is only a view of it (a tensor). An array that was overwritten
    since is checked again when one of 4 sampled rows shows it; to be sure, make a new `Bank`.
    """
    check_matrix(rows, "bank")
    owner = rows if owner is None else owner
    stamp, key = _stamp(rows), id(owner)
    known = _norms.get(key)
    if known is not None and known[0]() is owner and known[1] == stamp:
        return Bank([rows], largest_norm=known[2])
    bank = Bank([rows])
    with _norms_lock:
        _norms[key] = (weakref.ref(owner, lambda _: _norms.pop(key, None)), stamp, bank.largest_norm)
    return bank


def check_matrix(rows: object, name: str) -> None:
    """Raise `BadInput` unless `rows` is a float matrix with at least one column."""
    if not isinstance(rows, np.ndarray):
        raise BadInput(f"{name}: expected an array or a tensor of shape (rows, dim), got {type(rows).__name__}")
    if rows.ndim != 2 or rows.shape[1] == 0 or rows.dtype.kind != "f":
        raise BadInput(f"{name}: expected floats of shape (rows, dim), got {rows.dtype} {rows.shape}")


def _stamp(rows: np.ndarray) -> object:
    sample = np.ascontiguousarray(rows[:: max(1, len(rows) // SAMPLED)])
    return rows.ctypes.data, rows.shape, zlib.crc32(sample.view(np.uint8).reshape(-1).data)
