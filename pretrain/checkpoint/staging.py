"""The copy to host memory, the only part of a save that training waits for.

Fragments are packed into one host buffer per data file, in the order and at the places they will have in that
file, so that the thread only has to write it out. The buffers are kept from save to save and can be made
ready beforehand: touching fresh memory for the first time costs many times the copy itself. On CUDA they are
pinned, and the copies of a save are queued together and waited for once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.fragments import Fragment
from pretrain.checkpoint.layout import range_key

FILE_LIMIT = 4 << 30  # bytes of data a file; a power of two, so that pinned allocation wastes nothing


@dataclass(frozen=True)
class Piece:
    """Elements [lo, hi) of a fragment's data, at byte `start` of a file's data."""

    fragment: Fragment
    lo: int
    hi: int
    start: int

    @property
    def stop(self) -> int:
        return self.start + (self.hi - self.lo) * self.fragment.dtype.itemsize

    @property
    def offset(self) -> int:
        """Place of the first element in the full tensor."""
        return self.fragment.offset + self.lo

    @property
    def key(self) -> str:
        return range_key(self.fragment.name, self.offset)


def plan_files(fragments: Sequence[Fragment], limit: int = FILE_LIMIT) -> list[list[Piece]]:
    """Lay the fragments into files of at most `limit` bytes (a multiple of 8), wide types first to keep
    alignment.

    Fragments longer than what is left of a file are cut. Pieces of nothing of a tensor that has elements are
    left out. Raises CheckpointError for a fragment that cannot be, or one given twice.
    """
    files: list[list[Piece]] = [[]]
    place, seen = 0, set()
    kinds: dict[str, tuple] = {}
    for f in sorted(fragments, key=lambda f: -f.dtype.itemsize):
        f.check()
        if (f.name, f.offset) in seen:
            raise CheckpointError(f"tensor {f.name!r}: the piece at element {f.offset} was given twice")
        seen.add((f.name, f.offset))
        if kinds.setdefault(f.name, (f.dtype, f.shape)) != (f.dtype, f.shape):
            raise CheckpointError(f"tensor {f.name!r}: its pieces disagree: {kinds[f.name]}, {(f.dtype, f.shape)}")
        lo, length, size = 0, f.data.numel(), f.dtype.itemsize
        if length == 0 and f.numel == 0:
            files[-1].append(Piece(f, 0, 0, place))
        while lo < length:
            if place == limit:
                files.append([])
                place = 0
            hi = min(length, lo + (limit - place) // size)
            files[-1].append(Piece(f, lo, hi, place))
            place += (hi - lo) * size
            lo = hi
    return [pieces for pieces in files if pieces]


class HostBuffers:
    """Reused host memory for one save at a time. Not safe to fill while an earlier save is being written."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def reserve(self, files: Sequence[Sequence[Piece]]) -> None:
        """Allocate, and touch, what a save of `files` needs."""
        for i, pieces in enumerate(files):
            self._buffer(i, pieces).zero_()

    def fill(self, files: Sequence[Sequence[Piece]]) -> list[Tensor]:
        """Copy `files` to the host and wait for it: a uint8 tensor a file, its data section."""
        filled, devices = [], set()
        for i, pieces in enumerate(files):
            buffer = self._buffer(i, pieces)
            for p in pieces:
                source = p.fragment.data[p.lo : p.hi]
                buffer[p.start : p.stop].view(p.fragment.dtype).copy_(source, non_blocking=True)
                if source.is_cuda:
                    devices.add(source.device)
            filled.append(buffer)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return filled

    def _buffer(self, i: int, pieces: Sequence[Piece]) -> Tensor:
        nbytes = pieces[-1].stop
        pinned = any(p.fragment.data.is_cuda for p in pieces)
        while len(self._buffers) <= i:
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        held = self._buffers[i]
        if held.numel() < nbytes or (pinned and not held.is_pinned()):
            self._buffers[i] = torch.empty(0, dtype=torch.uint8)  # let go of the old one before asking for more
            del held
            self._buffers[i] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        return self._buffers[i][:nbytes]
