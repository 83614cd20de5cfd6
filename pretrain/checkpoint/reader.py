"""Reading a checkpoint written by any number of ranks: whole tensors, or any range of one.

Only the bytes asked for are read (`pread` at the place that the data file's header gives), so a rank of
another layout loads its rows without seeing the rest. Whole tensors are checked against their checksums as
they are read; parts of a range cannot be, which is what `verify` is for.
"""

from __future__ import annotations

import logging
import os
import zlib
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.layout import DTYPES, MANIFEST, Placed, range_key, read_header, step_dirs
from pretrain.checkpoint.manifest import Entry, Manifest, Range, read_manifest

log = logging.getLogger(__name__)

_CHECK = 16 << 20  # bytes read at a time by verify


def open_checkpoint(path: Path | str) -> Checkpoint:
    """The checkpoint in one step folder. Raises CheckpointError if it is not whole."""
    checkpoint = Checkpoint(Path(path))
    checkpoint.check_files()
    return checkpoint


def find_checkpoint(path: Path | str) -> Checkpoint:
    """The newest whole checkpoint of a run folder or a checkpoints folder, or the one in one step's folder.

    Raises CheckpointError when there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such folder; give a run folder, its checkpoints folder, or one step's folder"
        )
    if (path / MANIFEST).is_file() or path.name.startswith("step_"):
        return open_checkpoint(path)
    found = find_latest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if found is None:
        raise CheckpointError(
            f"{path} holds no whole checkpoint; give a run folder, its checkpoints folder, or one step's"
        )
    return found


def find_latest(root: Path | str, *, verify: bool = False, at_most: int | None = None) -> Checkpoint | None:
    """The whole checkpoint of the highest step under `root` (not above `at_most`), None when there is none.

    Torn and damaged ones are passed over with a warning: no manifest, an unreadable one, files missing or of
    the wrong size; with `verify` also bytes that do not match their checksums (reads everything).
    """
    for step, path in step_dirs(Path(root)).items():
        if at_most is not None and step > at_most:
            continue
        try:
            checkpoint = open_checkpoint(path)
            if verify:
                checkpoint.verify()
            return checkpoint
        except CheckpointError as e:
            log.warning("checkpoint passed over: %s", e)
    return None


class Checkpoint:
    """One whole checkpoint: `.step`, `.meta` (the run's JSON), `.world` (ranks that wrote it), and its
    tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest = read_manifest(path / MANIFEST)
        self.step = self._manifest.step
        self.world = self._manifest.world
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
            self._pread(name, entry, r, 0, data)
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
            self._pread(name, entry, r, start - r.offset, _bytes(flat[start - lo : stop - lo]))
        return flat

    def check_files(self) -> None:
        """Raise CheckpointError unless every data file is there with its size; cheap."""
        check_files(self.path, self._manifest)

    def verify(self) -> None:
        """Sizes, headers and checksums: reads all bytes. Raises CheckpointError at the first fault."""
        self.check_files()
        for name, entry in self._manifest.tensors.items():
            size = DTYPES[entry.dtype].itemsize
            for r in entry.ranges:
                crc = 0
                for lo in range(0, max(r.length, 1), _CHECK // size):
                    data = memoryview(bytearray((min(r.length, lo + _CHECK // size) - lo) * size))
                    self._pread(name, entry, r, lo, data)
                    crc = zlib.crc32(data, crc)
                if crc != r.crc32:
                    raise self._damaged(name, r)

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
        placed, labels = read_header(self.path / file)
        ours = {"step": str(self.step), "attempt": self._manifest.attempt}
        if {k: labels.get(k) for k in ours} != ours:
            raise CheckpointError(
                f"{self.path / file}: is of step {labels.get('step')}, attempt {labels.get('attempt')}; the "
                f"manifest wants step {self.step}, attempt {self._manifest.attempt}: put the right file "
                f"back, or use another checkpoint"
            )
        return placed

    def _pread(self, name: str, entry: Entry, r: Range, skip: int, out: memoryview) -> None:
        """Fill `out` with the bytes from element `skip` of range `r` on."""
        path, placed = self.path / r.file, self._header(r.file).get(range_key(name, r.offset))
        if placed is None or placed[:2] != (entry.dtype, r.length):
            raise CheckpointError(
                f"{path}: does not hold tensor {name!r}, elements [{r.offset}, {r.offset + r.length}), as "
                f"the manifest says; files were mixed up or damaged: use another checkpoint"
            )
        place = placed.start + skip * DTYPES[entry.dtype].itemsize
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                while out:
                    got = os.preadv(fd, [out], place)
                    if got == 0:
                        raise self._damaged(name, r)
                    out, place = out[got:], place + got
            finally:
                os.close(fd)
        except OSError as e:
            raise CheckpointError(f"{path}: tensor {name!r} cannot be read ({e.strerror})") from e

    def _damaged(self, name: str, r: Range) -> CheckpointError:
        return CheckpointError(
            f"{self.path / r.file}: tensor {name!r}, elements [{r.offset}, {r.offset + r.length}): the bytes "
            f"do not match their checksum; the file is damaged: use another checkpoint (remove {self.path} "
            f"so that it is not found again)"
        )


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise CheckpointError, naming the file, unless all of a manifest's files have their sizes."""
    for name, size in manifest.files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as e:
            raise CheckpointError(f"{folder / name}: missing ({e.strerror}); use another checkpoint") from e
        if found != size:
            raise CheckpointError(
                f"{folder / name}: {found:,} bytes, should be {size:,}: cut short or damaged; use another checkpoint"
            )


def _bytes(flat: Tensor) -> memoryview:
    """The writable memory of a flat CPU tensor."""
    return flat.view(torch.uint8).numpy().data
