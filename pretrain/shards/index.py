"""The index of a shard: each sample's key and where its members lie, kept beside the tar.

`000.tar` gets `000.tar.idx.npz`, plain numpy arrays (no pickle) with the tar's size and time of change, so
that a tar that was written again is indexed again. Where the folder cannot be written to, the index goes to
$POLYVIEW_CACHE (default ~/.cache/polyview); where nothing can be written, it is made anew at each start. A
compressed tar has no places to point to and is refused: `python -m pretrain pack` unpacks it into shards.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
import zipfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from pretrain.errors import UserError
from pretrain.shards.grouping import Parts, Problem, Samples, group
from pretrain.shards.tarwalk import Gap, walk

INDEX_VERSION = 1
KINDS = {
    "key_bytes": np.uint8, "key_ends": np.int64, "first": np.int64, "offset": np.int64, "size": np.int64,
    "extension": np.uint16, "extensions": np.uint8, "problems": np.uint8,
}  # fmt: skip
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class ShardIndex:
    """Samples of one tar, in file order. Rows are numbered from 0.

    Kept as arrays (about 80 bytes a sample) and turned into Python objects only where asked.
    """

    def __init__(self, path: Path, arrays: dict[str, np.ndarray]):
        self.path = path
        # memoryviews: one number out of them is a Python int, several times cheaper than one out of an array
        self._key_bytes = arrays["key_bytes"].data  # all keys, UTF-8, end to end
        self._key_ends = arrays["key_ends"].data  # (n,)
        self._first = arrays["first"].data  # (n + 1,): row -> its members
        self._offset = arrays["offset"].data  # (members,)
        self._size = arrays["size"].data  # (members,)
        self._extension = arrays["extension"].data  # (members,): place in extensions
        self.extensions: list[str] = _strings(arrays["extensions"])
        lines = _strings(arrays["problems"])
        self.problems: list[Problem] = list(zip(lines[::2], lines[1::2]))

    def __len__(self) -> int:
        return len(self._first) - 1

    @property
    def damage(self) -> list[str]:
        """What was passed over and why, one line each; empty for a shard that is whole."""
        return [f"{key}: {reason}" if key else reason for key, reason in self.problems]

    @cached_property
    def keys(self) -> list[str]:
        data, ends = self._key_bytes.tobytes(), self._key_ends.tolist()
        return [data[start:end].decode() for start, end in zip([0, *ends], ends)]

    def key(self, row: int) -> str:
        start = self._key_ends[row - 1] if row else 0
        return str(self._key_bytes[start : self._key_ends[row]], "utf-8")

    def members(self, row: int) -> Parts:
        """``{extension: (offset, size)}`` of one sample; offsets count from the start of the tar."""
        at = range(self._first[row], self._first[row + 1])
        return {self.extensions[self._extension[i]]: (self._offset[i], self._size[i]) for i in at}

    def block(self, lo: int, hi: int) -> list[Parts]:
        """`members` of rows lo to hi - 1; cheaper than one by one."""
        ends = self._first[lo : hi + 1].tolist()
        a, b = ends[0], ends[-1]
        places = list(zip(self._offset[a:b].tolist(), self._size[a:b].tolist()))
        names = [self.extensions[code] for code in self._extension[a:b].tolist()]
        return [dict(zip(names[i - a : j - a], places[i - a : j - a])) for i, j in itertools.pairwise(ends)]

    def column(self, extension: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows that have a member of this extension, and its offset and size; (m,) int64 each."""
        if extension not in self.extensions:
            return (np.zeros(0, np.int64),) * 3
        at = np.flatnonzero(np.asarray(self._extension) == self.extensions.index(extension))
        rows = np.searchsorted(np.asarray(self._first), at, side="right") - 1
        return rows, np.asarray(self._offset)[at], np.asarray(self._size)[at]

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        """Byte range of the tar that holds every member of rows lo to hi - 1; (0, 0) when there are none."""
        a, b = self._first[lo], self._first[hi]
        if a == b:
            return 0, 0
        return self._offset[a], self._offset[b - 1] + self._size[b - 1]

    def extension_counts(self) -> dict[str, int]:
        """How many samples have each extension."""
        counts = np.bincount(self._extension, minlength=len(self.extensions)).tolist()
        return dict(zip(self.extensions, counts))


def load_index(tar: Path | str) -> ShardIndex:
    """The index of a tar: its sidecar where that still fits the tar, else made from the headers and kept.

    Raises UserError when there is no such file, or it is no tar, or a compressed one.
    """
    tar = Path(tar)
    stamp = stamp_of(tar)
    for sidecar in sidecar_places(tar):
        arrays = _read(sidecar, stamp)
        if arrays is not None:
            return ShardIndex(tar, arrays)
    arrays = _arrays(tar, stamp)
    for sidecar in sidecar_places(tar):
        if _write(sidecar, arrays):
            break
    return ShardIndex(tar, arrays)


def build_index(tar: Path | str) -> ShardIndex:
    """The index made from the tar's headers now; no sidecar is read or written."""
    return ShardIndex(Path(tar), _arrays(Path(tar), stamp_of(Path(tar))))


def index_length(tar: Path) -> int:
    """How many samples a tar holds, from its sidecar's smallest array where there is one."""
    stamp = stamp_of(tar)
    for sidecar in sidecar_places(tar):
        arrays = _read(sidecar, stamp, only=("samples",))
        if arrays is not None:
            return int(arrays["samples"])
    return len(load_index(tar))


def kept_arrays(tar: Path, kind: str, stamp: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """What `keep_arrays` kept of a tar under this kind and stamp; None where nothing is."""
    found = (_read(sidecar, stamp, only=names) for sidecar in sidecar_places(tar, kind))
    return next((arrays for arrays in found if arrays is not None), None)


def keep_arrays(tar: Path, kind: str, stamp: np.ndarray, arrays: dict[str, np.ndarray]) -> bool:
    """Keep arrays that were read from a tar after it had this stamp, where its index is kept; False where nothing
    can be written."""
    return any(_write(sidecar, arrays | {"stamp": stamp}) for sidecar in sidecar_places(tar, kind))


def sidecar_places(tar: Path, kind: str = "idx") -> list[Path]:
    """Where the index of a tar, or arrays of another kind, may be, best first."""
    cache = os.environ.get("POLYVIEW_CACHE")
    folder = Path(cache) if cache else Path("~/.cache/polyview").expanduser()
    whole = hashlib.blake2b(os.fsencode(tar.absolute()), digest_size=8).hexdigest()
    return [tar.with_name(f"{tar.name}.{kind}.npz"), folder / "shards" / f"{tar.name}-{whole}.{kind}.npz"]


def stamp_of(tar: Path) -> np.ndarray:
    """(3,) int64 that differ when the tar does: version of the index, size, time of change; UserError without one."""
    try:
        stat = tar.stat()
    except OSError as error:
        raise UserError(f"shard {tar} cannot be read: {error.strerror}") from error
    return np.array([INDEX_VERSION, stat.st_size, stat.st_mtime_ns], np.int64)


def _arrays(tar: Path, stamp: np.ndarray) -> dict[str, np.ndarray]:
    """Walk the tar's headers; the arrays of `ShardIndex`, and `stamp` and `samples` for the sidecar."""
    try:
        _refuse_compressed(tar)
        fd = os.open(tar, os.O_RDONLY)
        try:
            found = list(walk(fd, int(stamp[1])))
        finally:
            os.close(fd)
    except OSError as error:
        raise UserError(f"shard {tar} cannot be read: {error.strerror}") from error
    if len(found) == 1 and isinstance(found[0], Gap) and found[0].start == 0:
        raise UserError(f"shard {tar} is not a tar ({found[0].reason}): replace it, or leave it out")
    samples = group(found)
    return _pack(samples) | {"stamp": stamp}


def compression(path: Path) -> str | None:
    """What a file is compressed with, by its first bytes; None when it is not."""
    with open(path, "rb") as file:
        start = file.read(8)
    return next((name for magic, name in COMPRESSED.items() if start.startswith(magic)), None)


def _refuse_compressed(tar: Path) -> None:
    if name := compression(tar):
        raise UserError(
            f"{tar} is compressed ({name}): samples cannot be read out of its middle. "
            f"Unpack it into shards: python -m pretrain pack {tar} --out FOLDER"
        )


def _pack(samples: Samples) -> dict[str, np.ndarray]:
    keys = [key.encode() for key in samples.keys]
    extensions = sorted({extension for parts in samples.parts for extension in parts})
    code = {extension: i for i, extension in enumerate(extensions)}
    places = [place for parts in samples.parts for place in parts.values()]
    offset, size = np.array(places, np.int64).reshape(-1, 2).T
    return {
        "samples": np.array(len(keys), np.int64),
        "key_bytes": np.frombuffer(b"".join(keys), np.uint8),
        "key_ends": np.cumsum([len(key) for key in keys], dtype=np.int64),
        "first": np.cumsum([0, *map(len, samples.parts)], dtype=np.int64),
        "offset": np.ascontiguousarray(offset),
        "size": np.ascontiguousarray(size),
        "extension": np.array([code[e] for parts in samples.parts for e in parts], np.uint16),
        "extensions": _text(extensions),
        "problems": _text([text for problem in samples.problems for text in problem]),
    }


def _text(strings: Sequence[str]) -> np.ndarray:
    """Strings as bytes, each ended by a NUL (which no name in a tar can hold)."""
    return np.frombuffer("".join(s.replace("\0", "") + "\0" for s in strings).encode(), np.uint8)


def _strings(text: np.ndarray) -> list[str]:
    return text.tobytes().decode().split("\0")[:-1]


def _read(sidecar: Path, stamp: np.ndarray, only: Sequence[str] | None = None) -> dict[str, np.ndarray] | None:
    """The sidecar's arrays, or None when it is absent, torn, or of another state of the tar."""
    try:
        with np.load(sidecar, allow_pickle=False) as stored:
            if not np.array_equal(stored["stamp"], stamp):
                return None
            arrays = {name: stored[name] for name in (only or stored.files)}
        return arrays if only or _fits(arrays, int(stamp[1])) else None
    except (OSError, ValueError, KeyError, EOFError, IndexError, zipfile.BadZipFile):
        return None


def _fits(arrays: dict[str, np.ndarray], length: int) -> bool:
    """Whether every place lies inside the tar: a sidecar from elsewhere is not believed blindly."""
    if any(arrays[name].dtype != kind or arrays[name].ndim != 1 for name, kind in KINDS.items()):
        return False
    first, ends, offset, size = (arrays[name] for name in ("first", "key_ends", "offset", "size"))
    kinds = len(_strings(arrays["extensions"]))
    return bool(
        len(ends) == len(first) - 1
        and first[0] == 0
        and _rises(first, to=len(offset))
        and _rises(ends, to=len(arrays["key_bytes"]))
        and len(offset) == len(size) == len(arrays["extension"])
        and ((offset >= 0) & (size >= 0) & (size <= length) & (offset <= length - size)).all()
        and (arrays["extension"] < kinds).all()
    )


def _rises(edges: np.ndarray, to: int) -> bool:
    """Whether edges go from 0 or more up to exactly `to`, never back."""
    return bool((np.diff(edges, prepend=0, append=to) >= 0).all() and (edges[-1] if len(edges) else 0) == to)


def _write(sidecar: Path, arrays: dict[str, np.ndarray]) -> bool:
    """Write under a temporary name and rename, so that no reader sees half of it; False where one cannot
    write."""
    temporary = None
    try:
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=sidecar.parent, prefix=".idx-", delete=False) as file:
            temporary = Path(file.name)
            np.savez(file, allow_pickle=False, **arrays)
        temporary.chmod(0o644)
        temporary.replace(sidecar)
        return True
    except OSError:
        if temporary:
            temporary.unlink(missing_ok=True)
        return False
