"""The rows that are searched: one or several arrays in one line, checked once, read in blocks.

A bank may be float32 in memory, a float16 memory map of a segment, or a tensor on a GPU; blocks and gathered rows
come out as float32 tensors, so nothing but the candidate kernels cares which. It does not copy the rows.
"""

from __future__ import annotations

import math
import threading
import weakref
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from index.errors import BadInput

Rows = np.ndarray | Tensor

BLOCK_ROWS = 16384  # 16 MiB of float32 at width 256: a block and its scores stay near the cache
FLOATS = (np.float16, np.float32, np.float64, torch.float16, torch.bfloat16, torch.float32, torch.float64)
SAMPLED = 256  # rows looked at to see whether a known array was overwritten


class Bank:
    """Rows to search, (N, D); `largest_norm` is found by one pass, which is also the check that all is finite.

    Raises `BadInput` when a part is not a float matrix, the widths differ, or a value is not finite.
    """

    def __init__(self, parts: Sequence[Rows], largest_norm: float | None = None):
        if not parts:
            raise BadInput("bank: no array given; an empty bank is one of shape (0, dim)")
        for part in parts:
            check_matrix(part, "bank")
        widths = sorted({int(p.shape[1]) for p in parts})
        if len(widths) > 1:
            raise BadInput(f"bank: arrays of different widths {widths} cannot stand in one line")
        self.parts = list(parts)
        self.dim = widths[0]
        self.starts = np.cumsum([0, *(len(p) for p in parts)])
        self.rows = int(self.starts[-1])
        self.device = parts[0].device if isinstance(parts[0], Tensor) else torch.device("cpu")
        self.largest_norm = self._measure() if largest_norm is None else largest_norm

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[tuple[int, Tensor]]:
        """(first row, float32 block of at most `rows` rows); what is float32 already is not copied."""
        for start, part in zip(self.starts, self.parts):
            for lo in range(0, len(part), rows):
                yield int(start) + lo, _float32(part[lo : lo + rows])

    def runs(self) -> Iterator[tuple[int, Tensor]]:
        """As `blocks`, but an array that needs no conversion comes whole: for kernels that block by themselves."""
        for start, part in zip(self.starts, self.parts):
            step = max(1, len(part)) if _is_direct(part) else BLOCK_ROWS
            for lo in range(0, len(part), step):
                yield int(start) + lo, _float32(part[lo : lo + step])

    def take(self, ids: Tensor) -> Tensor:
        """The rows `ids` (M,) as float32 (M, D)."""
        if len(self.parts) == 1:
            return _gather(self.parts[0], ids)
        out = torch.empty(len(ids), self.dim, device=self.device)
        ends = torch.from_numpy(self.starts[1:]).to(ids.device)
        part_of = torch.searchsorted(ends, ids, right=True)
        for i in part_of.unique().tolist():
            here = part_of == i
            out[here] = _gather(self.parts[i], ids[here] - int(self.starts[i]))
        return out

    def _measure(self) -> float:
        """Largest Euclidean length of a row."""
        largest = 0.0
        for start, block in self.blocks():
            squares = torch.einsum("nd,nd->n", block, block)
            bad = (~torch.isfinite(squares)).nonzero()
            if len(bad):
                raise BadInput(f"bank: row {start + int(bad[0])} is not finite, or too large for float32 products")
            largest = max(largest, float(squares.max()))
        return math.sqrt(largest)


_norms: dict[int, tuple[weakref.ref, object, float]] = {}
_norms_lock = threading.Lock()


def as_bank(rows: Rows | Bank) -> Bank:
    """The bank of one array. That its rows are finite is remembered with the array, so a second call costs nothing.

    A tensor that was written to since is checked again (by its version counter), an array when a sample of its rows
    changed. Rows overwritten between the sampled ones go unnoticed: make a new `Bank` then.
    """
    if isinstance(rows, Bank):
        return rows
    check_matrix(rows, "bank")
    stamp = _stamp(rows)
    with _norms_lock:
        known = _norms.get(id(rows))
    if known is not None and known[0]() is rows and known[1] == stamp:
        return Bank([rows], largest_norm=known[2])
    bank = Bank([rows])
    key = id(rows)
    with _norms_lock:
        _norms[key] = (weakref.ref(rows, lambda _: _norms.pop(key, None)), stamp, bank.largest_norm)
    return bank


def check_matrix(rows: object, name: str) -> None:
    """Raise `BadInput` unless `rows` is a float matrix with at least one column."""
    if not isinstance(rows, np.ndarray | Tensor):
        raise BadInput(f"{name}: expected a numpy array or a tensor of shape (rows, dim), got {type(rows).__name__}")
    kind = rows.dtype if isinstance(rows, Tensor) else rows.dtype.type
    if rows.ndim != 2 or rows.shape[1] == 0 or kind not in FLOATS:
        raise BadInput(f"{name}: expected floats of shape (rows, dim), got {rows.dtype} {tuple(rows.shape)}")


def _stamp(rows: Rows) -> object:
    if isinstance(rows, Tensor):
        return rows.data_ptr(), rows._version
    sample = np.ascontiguousarray(rows[:: max(1, len(rows) // SAMPLED)])
    return rows.ctypes.data, rows.shape, zlib.crc32(sample.view(np.uint8).reshape(-1).data)


def _is_direct(part: Rows) -> bool:
    if isinstance(part, Tensor):
        return part.dtype == torch.float32 and part.is_contiguous()
    # torch warns about memory that it may not write to: such arrays go through a block's copy
    return part.dtype == np.float32 and part.flags.c_contiguous and part.flags.writeable


def _float32(part: Rows) -> Tensor:
    if isinstance(part, Tensor):
        return part.detach().float().contiguous()
    return torch.from_numpy(part if _is_direct(part) else np.array(part, dtype=np.float32, order="C"))


def _gather(part: Rows, ids: Tensor) -> Tensor:
    if isinstance(part, Tensor):
        return part.detach()[ids.to(part.device)].float()
    return torch.from_numpy(part[ids.numpy()].astype(np.float32, copy=False))
