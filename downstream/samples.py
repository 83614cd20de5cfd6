"""Samples of a source read in their own order: image bytes, captions and class number, without shuffling or
crops.

Training reads through `pretrain.reader`, which permutes; an evaluation wants every sample once, in file
order.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pretrain.errors import UserError
from pretrain.shards.entries import image_part
from pretrain.shards.source import Source, open_source
from pretrain.views.decode import DamagedSample

MOST_CLASSES = 1_000_000  # tables are as wide as the highest class number
SPLITS = {"train", "test", "val", "valid", "validation", "dev"}

log = logging.getLogger(__name__)


class Samples:
    """The samples of a source by their place in its line, or the `first` so many of them.

    Opens a shard at a time, for one thread.
    """

    def __init__(self, spec: str, first: int | None = None) -> None:
        self.spec = spec
        self.source: Source = open_source(spec)
        if not self.source.samples:
            raise UserError(f"{spec}: the shards there hold no samples")
        self._number = min(first or self.source.samples, self.source.samples)
        self._open: tuple[int, int] | None = None  # (shard, file descriptor)
        self._left_out: set[int] = set()

    def __len__(self) -> int:
        return self._number

    @property
    def dataset(self) -> str:
        """The data set's name: the folder's, or its parent's where the folder is a split's."""
        folder = Path(self.spec).absolute()
        folder = folder if folder.is_dir() else folder.parent
        return folder.parent.name if folder.name.lower() in SPLITS and folder.parent.name else folder.name

    def beside(self, file: str) -> Path | None:
        """A file of the data set (classnames.txt): in the shards' folder, or in the one above it."""
        folder = self.source.shards[0].parent
        return next((place / file for place in (folder, folder.parent) if (place / file).is_file()), None)

    def key(self, sample: int) -> str:
        """The sample's key."""
        return self.source.key(sample)

    def image(self, sample: int) -> bytes:
        """The image's bytes as stored; DamagedSample where the sample has none."""
        members = self._members(sample)
        found = image_part(members)
        if found is None:
            raise DamagedSample(f"no image: it has {', '.join(sorted(members)) or 'nothing'}")
        return self._read(sample, *members[found])

    def captions(self, sample: int) -> list[str]:
        """The sample's captions, one a line of its `txt`; empty lines are none. DamagedSample where not
        UTF-8.
        """
        members = self._members(sample)
        if "txt" not in members:
            return []
        try:
            text = self._read(sample, *members["txt"]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedSample(f"captions are not UTF-8 (byte {error.start})") from None
        return [line.strip().replace("\\n", "\n") for line in text.split("\n") if line.strip()]

    def label(self, sample: int) -> int:
        """The sample's class number, -1 where it has none; UserError where its `cls` is no such number."""
        members = self._members(sample)
        if "cls" not in members:
            return -1
        text = self._read(sample, *members["cls"]).strip()
        if text == b"-1":
            return -1
        if not text.isdigit() or len(text) > 18 or int(text) >= MOST_CLASSES:
            shown = text[:20].decode("utf-8", "replace")
            raise UserError(
                f"{self._place(sample)}: its class is {shown!r}, not a number below {MOST_CLASSES:,}; "
                "pack the data again"
            )
        return int(text)

    def labels(self, samples: Iterator[int] | range) -> np.ndarray:
        """Class numbers of these samples, (n,) int64."""
        return np.fromiter((self.label(i) for i in samples), np.int64)

    def leave_out(self, sample: int, reason: str) -> None:
        """Say in the log, once, that a sample cannot be used."""
        if sample not in self._left_out:
            self._left_out.add(sample)
            log.warning("left out: %s (%s)", self.key(sample), reason)

    def close(self) -> None:
        """Close the shard that is open."""
        if self._open:
            os.close(self._open[1])
            self._open = None

    def _members(self, sample: int) -> dict[str, tuple[int, int]]:
        shard, row = self._locate(sample)
        return self.source.index(shard).members(row)

    def _locate(self, sample: int) -> tuple[int, int]:
        shard, row = self.source.locate(np.array([sample]))
        return int(shard[0]), int(row[0])

    def _place(self, sample: int) -> str:
        shard, _ = self._locate(sample)
        return f"{self.source.shards[shard].name}: {self.key(sample)}"

    def _read(self, sample: int, offset: int, size: int) -> bytes:
        shard, _ = self._locate(sample)
        if self._open is None or self._open[0] != shard:
            self.close()
            self._open = shard, os.open(self.source.shards[shard], os.O_RDONLY)
        data = os.pread(self._open[1], size, offset)
        if len(data) != size:
            raise DamagedSample(f"{self._place(sample)}: the shard ends within this sample")
        return data
