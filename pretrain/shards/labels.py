"""The class number of every sample of a source, from its `.cls` members: what an order by class stands on.

The index says where the members lie; each shard is read from front to back, members that lie near one another
in one go, several shards at a time. The numbers are kept beside the shard's index (`000.tar.cls.npz`, by the
same rules: the tar's size and time of change, a cache folder where the shard's cannot be written to, made anew
where nothing can), so that a source is read for its classes once, not once a start and rank.

A class that cannot be read counts as none and is warned of: the reader would pass the sample over anyway.
"""

from __future__ import annotations

import itertools
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pretrain.errors import UserError
from pretrain.shards.index import ShardIndex, keep_arrays, kept_arrays, stamp_of
from pretrain.shards.source import Source

CLASS_EXTENSION = "cls"
NO_LABEL = -1
THREADS = 8
GAP_BYTES = 16 << 10  # members nearer than this are read in one go
RUN_BYTES = 1 << 20  # about the most that is read at once
TOLD = 5  # samples that a warning names

_DAMAGED = -2  # as it is kept: a class that is there and no number

log = logging.getLogger(__name__)


def source_labels(source: Source) -> np.ndarray:
    """(N,) int64 class numbers of a source's samples in their order, NO_LABEL where a sample has none.

    Raises UserError when a shard is gone, has changed, or cannot be read.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        parts = list(pool.map(lambda shard: _shard_labels(source, shard), range(len(source.shards))))
    labels = np.concatenate([np.zeros(0, np.int64), *parts])
    damaged = np.flatnonzero(labels == _DAMAGED)
    if damaged.size:
        _warn(source, damaged, len(labels))
        labels[damaged] = NO_LABEL
    return labels


def class_number(text: bytes) -> int | None:
    """The class that the bytes of a `.cls` member stand for: digits alone, within int64; None for anything else."""
    text = text.strip()
    return int(text) if text.isdigit() and len(text) <= 18 else None


def _shard_labels(source: Source, shard: int) -> np.ndarray:
    """(n,) labels of one shard, _DAMAGED among them; kept ones where they fit the tar."""
    path, samples = source.shards[shard], source.lengths[shard]
    if not samples:
        return np.zeros(0, np.int64)
    stamp = stamp_of(path)
    kept = kept_arrays(path, CLASS_EXTENSION, stamp, ("labels",))
    if kept is not None and kept["labels"].shape == (samples,) and kept["labels"].dtype == np.int64:
        return kept["labels"]
    labels = _read_labels(source.index(shard))
    keep_arrays(path, CLASS_EXTENSION, stamp, {"labels": labels})
    return labels


def _read_labels(index: ShardIndex) -> np.ndarray:
    labels = np.full(len(index), NO_LABEL, np.int64)
    rows, offset, size = index.column(CLASS_EXTENSION)
    order = np.argsort(offset, kind="stable")
    rows, offset, size = rows[order], offset[order], size[order]
    if rows.size:
        for row, text in zip(rows.tolist(), _members(index.path, offset, size)):
            number = class_number(text)
            labels[row] = _DAMAGED if number is None else number
    return labels


def _members(path: Path, offset: np.ndarray, size: np.ndarray) -> list[bytes]:
    """The bytes of members at rising offsets."""
    ends = offset + size
    texts: list[bytes] = []
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for first, last in _runs(offset, ends):
                start = int(offset[first])
                data = _pread(fd, start, int(ends[first:last].max()) - start)
                spans = zip((offset[first:last] - start).tolist(), (ends[first:last] - start).tolist())
                texts += [data[begin:end] for begin, end in spans]
        finally:
            os.close(fd)
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror}") from error
    return texts


def _runs(offset: np.ndarray, ends: np.ndarray) -> list[tuple[int, int]]:
    """First and last (exclusive) member of each read: cut at wide gaps, and where a read would grow long."""
    wide = offset[1:] - ends[:-1] > GAP_BYTES
    long = np.diff(offset // RUN_BYTES) > 0
    cuts = [0, *(np.flatnonzero(wide | long) + 1).tolist(), len(offset)]
    return list(itertools.pairwise(cuts))


def _pread(fd: int, start: int, size: int) -> bytes:
    """`size` bytes from `start`; fewer only where the file ends, whose members then are no numbers."""
    data = os.pread(fd, size, start)
    while len(data) < size and (more := os.pread(fd, size - len(data), start + len(data))):
        data += more
    return data


def _warn(source: Source, damaged: np.ndarray, samples: int) -> None:
    shards, rows = source.locate(damaged[:TOLD])
    names = [f"{source.shards[s]} {source.index(s).key(r)}" for s, r in zip(shards.tolist(), rows.tolist())]
    more = ", …" if damaged.size > TOLD else ""
    log.warning(
        f"the class of {damaged.size} of {samples} samples cannot be read (.cls must hold a number), "
        f"they count as without one: {', '.join(names)}{more}"
    )
