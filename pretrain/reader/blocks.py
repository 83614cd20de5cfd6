"""Samples' bytes out of tars: few reads, each byte about once a rank.

The order keeps blocks of neighbouring samples together and shuffles a lane inside windows, so a rank comes
back to a block over many steps. Where the blocks in use fit in half the budget, a block is read whole at its
first use and kept (least recently used goes first); where they do not, keeping some would read the rest again
and again, so only the samples asked for are read, neighbours in one go. Either way the bytes of an epoch are
read about once; what differs is how many requests that takes. The choice never changes what is returned.
An order by class has no neighbours: its blocks in use are all there are, so a small source comes to be held
whole and of a large one the samples are read singly.

Local and mounted files only, by positioned reads (no shared file position: any number of threads).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pretrain.errors import UserError
from pretrain.order import Order
from pretrain.shards.source import Source

BUDGET_BYTES = 2 << 30
GAP_BYTES = 4096  # members nearer than this (headers, padding, small members between) are read in one go
OPEN_FILES = 128


class Sample(NamedTuple):
    """The wanted members of one sample, as views of the bytes they were read with."""

    key: str
    shard: Path
    members: dict[str, memoryview]  # extension -> bytes


class _Place(NamedTuple):
    start: int
    stop: int
    extension: str
    sample: Sample


class Blocks:
    """Reads samples of `sources`, whole blocks at a time where those in use fit in `budget` bytes.

    `wanted` are the extensions to read; a sample's other members are passed over. Safe to use from several
    threads.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        order: Order,
        wanted: frozenset[str],
        *,
        world: int = 1,
        budget: int = BUDGET_BYTES,
    ) -> None:
        self._sources = sources
        self._sizes = order.blocks
        self._wanted = wanted
        self._budget = budget
        self.whole = 2 * bytes_in_use(sources, order, world) <= budget
        self.bytes_read = 0
        self.reads = 0
        self._held: OrderedDict[tuple[int, int], tuple[list[Sample], int]] = OrderedDict()
        self._held_bytes = 0
        self._lock = threading.Lock()  # of all that counts above
        self._reading = [threading.Lock() for _ in range(64)]  # one reader a block, several blocks at a time
        self._open = lru_cache(maxsize=OPEN_FILES)(_File)

    def read(self, source: int, ids: np.ndarray) -> list[Sample]:
        """The samples `ids` (n,) of one source, in that order. UserError names an unreadable shard."""
        if not self.whole:
            ordered, back = np.unique(ids, return_inverse=True)
            samples, _ = self._read(source, ordered)
            return [samples[i] for i in back]
        blocks = {number: self._block(source, number) for number in np.unique(ids // self._sizes[source]).tolist()}
        return [blocks[i // self._sizes[source]][i % self._sizes[source]] for i in ids.tolist()]

    def _block(self, source: int, number: int) -> list[Sample]:
        key = (source, number)
        with self._reading[hash(key) % len(self._reading)]:
            with self._lock:
                if key in self._held:
                    self._held.move_to_end(key)
                    return self._held[key][0]
            first = number * self._sizes[source]
            last = min(first + self._sizes[source], self._sources[source].samples)
            samples, size = self._read(source, np.arange(first, last))
            self._keep(key, samples, size)
            return samples

    def _keep(self, key: tuple[int, int], samples: list[Sample], size: int) -> None:
        with self._lock:
            self._held[key] = (samples, size)
            self._held_bytes += size
            while self._held_bytes > self._budget and len(self._held) > 1:
                self._held_bytes -= self._held.popitem(last=False)[1][1]

    def _read(self, source: int, ids: np.ndarray) -> tuple[list[Sample], int]:
        """Samples of rising `ids`, and how many bytes were read for them."""
        samples: list[Sample] = []
        size = 0
        shards, rows = self._sources[source].locate(ids)
        for shard, group in groupby(zip(shards.tolist(), rows.tolist()), key=lambda place: place[0]):
            places = self._places(self._sources[source], shard, [row for _, row in group], samples)
            for run in _runs(places):
                size += self._read_run(run)
        return samples, size

    def _places(self, source: Source, shard: int, rows: list[int], samples: list[Sample]) -> list[_Place]:
        """Where the wanted members of the rows lie; each row's sample is added to `samples`, still empty."""
        index, places = source.index(shard), []
        for row in rows:
            sample = Sample(index.key(row), index.path, {})
            samples.append(sample)
            for extension, (offset, size) in index.members(row).items():
                if extension in self._wanted:
                    places.append(_Place(offset, offset + size, extension, sample))
        return sorted(places, key=lambda place: place.start)

    def _read_run(self, run: list[_Place]) -> int:
        """Read what lies between the first and the last member at once, and hand each member its part."""
        sample, start, stop = run[0].sample, run[0].start, max(place.stop for place in run)
        data = memoryview(self._bytes(sample, start, stop))
        for place in run:
            place.sample.members[place.extension] = data[place.start - start : place.stop - start]
        return len(data)

    def _bytes(self, sample: Sample, start: int, stop: int) -> bytes:
        try:
            data = self._open(sample.shard).read(start, stop - start)
        except OSError as error:
            raise UserError(
                f"shard {sample.shard}, sample {sample.key}: bytes {start} to {stop} cannot be read: {error}"
            ) from error
        if len(data) < stop - start:
            raise UserError(
                f"shard {sample.shard} ends before byte {stop}, which its index names (from sample "
                f"{sample.key} on): it was cut short after it was indexed. Restore it, or note it anew: "
                f"python -m pretrain pack {sample.shard.parent}"
            )
        with self._lock:
            self.reads += 1
            self.bytes_read += len(data)
        return data


def bytes_in_use(sources: Sequence[Source], order: Order, world: int) -> int:
    """About how many bytes the blocks hold that one rank goes back and forth between: its lanes' windows."""
    lanes = -(-order.lanes // world)
    total = 0.0
    for source, block in zip(sources, order.blocks):
        window = min(order.window, -(-source.samples // order.lanes))
        total += min(lanes * (window + 2 * block), source.samples) * _sample_bytes(source)
    return int(total)


def _sample_bytes(source: Source) -> float:
    """Mean bytes of a sample, from up to 16 shards spread over the source."""
    filled = [i for i, length in enumerate(source.lengths) if length]
    some = filled[:: max(1, len(filled) // 16)]
    try:
        size = sum(source.shards[i].stat().st_size for i in some)
    except OSError as error:
        raise UserError(f"shard {error.filename} cannot be read: {error.strerror}") from error
    return size / max(1, sum(source.lengths[i] for i in some))


def _runs(places: list[_Place]) -> list[list[_Place]]:
    """Sorted places cut into runs that are worth one read each."""
    runs: list[list[_Place]] = []
    stop = 0
    for place in places:
        if runs and place.start - stop <= GAP_BYTES:
            runs[-1].append(place)
        else:
            runs.append([place])
        stop = max(stop, place.stop)
    return runs


class _File:
    """An open file that is closed when the last thread that reads it lets go."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, start: int, size: int) -> bytes:
        """Up to `size` bytes from `start`; fewer only where the file ends."""
        data = os.pread(self._fd, size, start)
        while len(data) < size and (more := os.pread(self._fd, size - len(data), start + len(data))):
            data += more
        return data

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)
