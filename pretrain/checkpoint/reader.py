"""Reading a checkpoint written by any number of ranks: whole tensors, or any range of one.

Only the bytes asked for are read (at the place that the data file's header gives), so a rank of another layout loads
its rows without seeing the rest. Whole tensors are checked against their checksums as they are read; parts of a range
cannot be, which is what `verify` is for.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.errors import CheckpointError, unreadable
from pretrain.checkpoint.layout import DTYPES, Placed, range_key, read_header
from pretrain.checkpoint.manifest import Entry, Range, read_manifest
from pretrain.checkpoint.store import Store
from pretrain.patience import patiently

_CHECK = 16 << 20  # bytes read at a time by verify


class Checkpoint:
    """One whole checkpoint: `.path` (the step's folder), `.step`, `.meta` (the run's JSON), `.world` (ranks that wrote
    it), `.run` (the id of the run that did), `.attempt` (which start of it), and its tensors.
    """

    def __init__(self, path: Store) -> None:
        self.path = path
        self._manifest = read_manifest(path)
        self.step = self._manifest.step
        self.world = self._manifest.world
        self.attempt = self._manifest.attempt
        self.run = self._manifest.run
        self.meta: dict[str, Any] = dict(self._manifest.meta)
        self._header = lru_cache(maxsize=None)(self._read_header)

    def names(self) -> list[str]:
        return list(self._manifest.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._entry(name).dtype]

    def read(self, name: str) -> Tensor:
        """The full tensor, on the CPU. Raises CheckpointError if it is not there or its bytes are damaged."""
        entry = self._entry(name)
        flat = torch.empty(entry.numel, dtype=DTYPES[entry.dtype])
        for r in entry.ranges:
            data = _bytes(flat[r.offset : r.offset + r.length])
            self._fill(name, entry, r, 0, data)
            if zlib.crc32(data) != r.crc32:
                raise self._damaged(name, r)
        return flat.reshape(entry.shape)

    def read_range(self, name: str, lo: int, hi: int) -> Tensor:
        """Elements [lo, hi) of the row-major tensor, flat, on the CPU; reads no other bytes of it."""
        entry = self._entry(name)
        if not 0 <= lo <= hi <= entry.numel:
            raise CheckpointError(
                f"{self.path}: tensor {name!r}: elements [{lo}, {hi}) asked for, it has {entry.numel} "
                f"(shape {entry.shape})"
            )
        flat = torch.empty(hi - lo, dtype=DTYPES[entry.dtype])
        first = bisect_right(entry.ranges, lo, key=lambda r: r.offset) - 1
        for r in entry.ranges[max(first, 0) :] if lo < hi else ():
            if r.offset >= hi:
                break
            start, stop = max(lo, r.offset), min(hi, r.offset + r.length)
            self._fill(name, entry, r, start - r.offset, _bytes(flat[start - lo : stop - lo]))
        return flat

    def check_files(self) -> None:
        """Raise CheckpointError unless every data file is there with its size; cheap."""
        check_files(self.path, self._manifest.files)

    def verify(self, rank: int = 0, world: int = 1) -> None:
        """Sizes of a `world`-th of the files, headers and checksums of a `world`-th of the bytes; `world` ranks look at
        them all.

        Raises CheckpointError at the first fault.
        """
        check_files(self.path, dict(islice(self._manifest.files.items(), rank, None, world)))
        for file, held in self._share(rank, world).items():
            placed = sorted(((self._place(*which), which) for which in held), key=lambda p: p[0].start)
            window = _Window(self.path, file, max(place.stop for place, _ in placed))
            for place, (name, _, r) in placed:
                crc = 0
                try:
                    for data in window.views(place.start, place.stop):
                        crc = zlib.crc32(data, crc)
                except EOFError:
                    raise self._damaged(name, r) from None
                except OSError as e:
                    raise self._unreadable(name, r, e) from e
                if crc != r.crc32:
                    raise self._damaged(name, r)

    def _share(self, rank: int, world: int) -> dict[str, list[tuple[str, Entry, Range]]]:
        """The ranges that `rank` looks at, by file: those that begin in its part of all of them laid end to end."""
        line = sorted(
            ((name, entry, r) for name, entry in self._manifest.tensors.items() for r in entry.ranges),
            key=lambda which: which[2].file,
        )
        sizes = [r.length * DTYPES[entry.dtype].itemsize for _, entry, r in line]
        total, begin = max(sum(sizes), 1), 0
        share: dict[str, list[tuple[str, Entry, Range]]] = {}
        for which, size in zip(line, sizes):
            if min(begin * world // total, world - 1) == rank:
                share.setdefault(which[2].file, []).append(which)
            begin += size
        return share

    def _entry(self, name: str) -> Entry:
        try:
            return self._manifest.tensors[name]
        except KeyError:
            near = [n for n in self._manifest.tensors if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:3]
            hint = f"; it has {', '.join(near)} …" if near else ""
            raise CheckpointError(
                f"{self.path}: holds no tensor {name!r}{hint}: it is of another model, objective or optimizer"
            ) from None

    def _read_header(self, file: str) -> dict[str, Placed]:
        """Where the ranges of a data file are, once it has shown that it belongs to this checkpoint."""
        placed, labels = read_header(self.path, file, self._manifest.files.get(file, 0))
        ours = {"step": str(self.step), "attempt": self.attempt}
        if {k: labels.get(k) for k in ours} != ours:
            raise CheckpointError(
                f"{self.path / file}: is of step {labels.get('step')}, attempt {labels.get('attempt')}; the "
                f"manifest wants step {self.step}, attempt {self.attempt}: put the right file "
                f"back, or use another checkpoint"
            )
        return placed

    def _place(self, name: str, entry: Entry, r: Range) -> Placed:
        """Where range `r` lies in its file."""
        placed = self._header(r.file).get(range_key(name, r.offset))
        if placed is None or placed[:2] != (entry.dtype, r.length):
            raise CheckpointError(
                f"{self.path / r.file}: does not hold tensor {name!r}, elements [{r.offset}, {r.offset + r.length}), "
                f"as the manifest says; files were mixed up or damaged: use another checkpoint"
            )
        return placed

    def _fill(self, name: str, entry: Entry, r: Range, skip: int, out: memoryview) -> None:
        """Fill `out` with the bytes from element `skip` of range `r` on."""
        place = self._place(name, entry, r)
        try:
            patiently(self.path.read_into, r.file, place.start + skip * DTYPES[entry.dtype].itemsize, out)
        except EOFError:
            raise self._damaged(name, r) from None
        except OSError as e:
            raise self._unreadable(name, r, e) from e

    def _unreadable(self, name: str, r: Range, error: OSError) -> CheckpointError:
        return unreadable(f"{self.path / r.file}: tensor {name!r}", error)

    def _damaged(self, name: str, r: Range) -> CheckpointError:
        return CheckpointError(
            f"{self.path / r.file}: tensor {name!r}, elements [{r.offset}, {r.offset + r.length}): the bytes "
            f"do not match their checksum; the file is damaged: use another checkpoint (remove {self.path} "
            f"so that it is not found again)"
        )


class _Window:
    """A data file read front to back in large pieces, however small the ranges in it are."""

    def __init__(self, folder: Store, file: str, stop: int) -> None:
        self._folder, self._file, self._stop = folder, file, stop
        self._buffer = memoryview(bytearray(min(stop, _CHECK)))
        self._lo = self._hi = 0

    def views(self, lo: int, hi: int) -> Iterator[memoryview]:
        """Bytes [lo, hi) in pieces, each good until the next is asked for."""
        while lo < hi:
            if not self._lo <= lo < self._hi:
                self._lo, self._hi = lo, min(lo + len(self._buffer), self._stop)
                patiently(self._folder.read_into, self._file, lo, self._buffer[: self._hi - lo])
            stop = min(hi, self._hi)
            yield self._buffer[lo - self._lo : stop - self._lo]
            lo = stop


def check_files(folder: Store, files: Mapping[str, int]) -> None:
    """Raise CheckpointError, naming the file, unless all of `files` are in `folder` with those sizes."""
    try:
        sizes = patiently(folder.sizes, files)
    except OSError as e:
        raise unreadable(f"{folder}: the list of its files", e) from e
    for name, size in files.items():
        found = sizes.get(name)
        if found is None:
            raise CheckpointError(f"{folder / name}: missing; use another checkpoint")
        if found != size:
            raise CheckpointError(
                f"{folder / name}: {found:,} bytes, should be {size:,}: cut short or damaged; use another checkpoint"
            )


def _bytes(flat: Tensor) -> memoryview:
    """The writable memory of a flat CPU tensor."""
    return flat.view(torch.uint8).numpy().data
