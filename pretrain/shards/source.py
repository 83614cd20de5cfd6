"""Many shards as one line of samples: shard after shard, rows in file order, numbered from 0.

Only the shards' lengths are held; the index of a shard is loaded when a sample of it is asked for, and the
least recently used ones are let go, so that a source of 200,000 shards opens fast and stays small. Lengths
come from the folder's `pack.json` (written by `python -m pretrain pack`, also for tars made elsewhere), else
from the sidecars, else from the tars' headers. A length that no longer fits its shard is an error when that
shard is first read.
"""

from __future__ import annotations

import difflib
import glob
import json
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.errors import UserError
from pretrain.shards.index import ShardIndex, index_length, load_index

SUMMARY = "pack.json"

log = logging.getLogger(__name__)


class Shard(NamedTuple):
    """A tar, and how many samples a pack.json notes for it (None: not noted)."""

    path: Path
    samples: int | None


class Source:
    """Shards in their order. ``lengths[i]`` is the number of samples of ``shards[i]`` (0 is allowed).

    `shards` are paths, or what `expand_shards` found. Indexes of `cached` shards are kept; safe to use from
    several threads.
    """

    def __init__(self, shards: Sequence[Path | Shard], cached: int = 256):
        found = [shard if isinstance(shard, Shard) else Shard(Path(shard), None) for shard in shards]
        self.shards = [shard.path for shard in found]
        self.lengths: list[int] = _lengths(found)
        self._ends = np.cumsum(self.lengths, dtype=np.int64)
        self._cached = cached
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._warned: set[Path] = set()
        self._lock = threading.Lock()

    @property
    def samples(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def keep_indexes(self, samples: int) -> None:
        """Keep the indexes of as many shards as hold about `samples`, where that is more than are kept: for
        readers that jump among all shards."""
        shards = samples * len(self.shards) // max(1, self.samples)
        self._cached = max(self._cached, min(shards, len(self.shards)))

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and row, each (b,) int64, of sample ids (b,) int64; IndexError for an id outside the
        line."""
        ids = np.asarray(ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.samples):
            raise IndexError(f"sample ids from {ids.min()} to {ids.max()}: this source has 0 to {self.samples - 1}")
        shard = np.searchsorted(self._ends, ids, side="right")
        starts = np.concatenate([[0], self._ends[:-1]]) if len(self._ends) else self._ends
        return shard, ids - starts[shard]

    def index(self, shard: int) -> ShardIndex:
        """The index of ``shards[shard]``; UserError when the shard is gone or holds another number of
        samples."""
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
                return self._indexes[shard]
        index = load_index(self.shards[shard])
        if len(index) != self.lengths[shard]:
            raise UserError(
                f"{index.path} holds {len(index)} samples where {self.lengths[shard]} were noted: "
                f"it has changed. Note it anew: python -m pretrain pack {index.path.parent}"
            )
        self._warn(index)
        with self._lock:
            self._indexes[shard] = index
            while len(self._indexes) > self._cached:
                self._indexes.popitem(last=False)
        return index

    def _warn(self, index: ShardIndex) -> None:
        """Say once of a shard what of it is not read."""
        if index.damage and index.path not in self._warned:
            self._warned.add(index.path)
            log.warning(
                "%s is damaged in %d place(s), the rest is read: %s (all: python -m pretrain verify %s)",
                *(index.path, len(index.damage), index.damage[0], index.path),
            )

    def key(self, id: int) -> str:
        """The key of one sample."""
        shard, row = self.locate(np.array([id]))
        return self.index(int(shard[0])).key(int(row[0]))


def open_source(spec: str | Path | Sequence[str | Path]) -> Source:
    """Open a folder of tars, a glob, a brace expression (`a-{000..009}.tar`), one tar, or a list of these.

    In a folder the shards stand in the order of its `pack.json`, else by name with numbers counted as
    numbers. Raises UserError naming what is missing and the nearest names there are.
    """
    shards = expand_shards(spec)
    if not shards:
        raise UserError(f"no shards in {spec!r}: name a folder of *.tar, a glob, or a list of tars")
    return Source(shards)


def expand_shards(spec: str | Path | Sequence[str | Path], trust_summary: bool = True) -> list[Shard]:
    """The tars that folders, globs, brace expressions and names stand for, in order.

    With `trust_summary` a folder's tars must be those its pack.json names; without, they are those that are
    there.
    """
    specs = [spec] if isinstance(spec, str | Path) else list(spec)
    shards = [shard for one in specs for shard in _expand(str(one), trust_summary)]
    return _noted(shards) if trust_summary else shards


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The folder's pack.json, or None where there is none; UserError when it cannot be understood."""
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_bytes())
        for shard in summary["shards"]:
            shard["name"], int(shard["samples"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): write it anew: python -m pretrain pack {folder}") from error
    return summary


def _expand(spec: str, trust_summary: bool) -> list[Shard]:
    if "://" in spec or spec.startswith("pipe:"):
        raise UserError(f"{spec}: shards are read from local or mounted folders; copy them to one")
    if Path(spec).is_dir():
        return _in_folder(Path(spec), trust_summary)
    if Path(spec).exists():
        return [Shard(Path(spec), None)]
    if "{" in spec:
        expanded = _expand_braces(spec)
        if len(expanded) > 1:
            return [shard for one in expanded for shard in _expand(one, trust_summary)]
        spec = expanded[0]
    if re.search(r"[*?\[]", spec):
        found = [Path(name) for name in glob.glob(spec, recursive=True)]
        if found:
            return [Shard(path, None) for path in sorted(found, key=natural)]
    if not Path(spec).exists():
        raise UserError(f"no shard {spec}{_nearest(Path(spec))}")
    return [Shard(Path(spec), None)]


def _expand_braces(spec: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(spec))
    except ValueError as error:
        raise UserError(f"{spec}: braces do not expand ({error})") from error


def _in_folder(folder: Path, trust_summary: bool) -> list[Shard]:
    present = {name for name in os.listdir(folder) if name.endswith(".tar")}
    summary = read_summary(folder) if trust_summary else None
    if summary is not None:
        return _summarised(folder, summary, present)
    if not present:
        inner = sorted({path.parent.name for path in folder.glob("*/*.tar")})
        hint = f": did you mean {' or '.join(str(folder / name) for name in inner[:3])}?" if inner else ""
        raise UserError(f"{folder} holds no *.tar{hint or ': make some with python -m pretrain pack'}")
    return [Shard(path, None) for path in sorted((folder / name for name in present), key=natural)]


def _summarised(folder: Path, summary: dict[str, Any], present: set[str]) -> list[Shard]:
    """The shards that pack.json names, which must be the shards there are."""
    named = {shard["name"]: int(shard["samples"]) for shard in summary["shards"]}
    for name in named:
        if name not in present and not (folder / name).exists():
            missing = folder / name
            raise UserError(f"no shard {missing}, which {folder / SUMMARY} names{_nearest(missing)}")
    if extra := sorted(present - named.keys()):
        raise UserError(
            f"{folder / SUMMARY} does not name {extra[0]}{' and others' if len(extra) > 1 else ''}: "
            f"write it anew: python -m pretrain pack {folder}"
        )
    return [Shard(folder / name, samples) for name, samples in named.items()]


def natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Sort key under which 2.tar stands before 10.tar."""
    parts = re.split(r"([0-9]+)", str(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], str(path)


def _nearest(missing: Path) -> str:
    """What a person may have meant: the nearest names in the nearest folder that exists."""
    folder = missing.parent
    while not folder.is_dir():
        missing, folder = folder, folder.parent
    names = [path.name for path in folder.iterdir() if path.is_dir() or path.suffix == ".tar"]
    near = difflib.get_close_matches(missing.name, names, n=3, cutoff=0.3)
    return f"; nearest in {folder}: {', '.join(near)}" if near else f" (nothing like it in {folder})"


def _noted(shards: list[Shard]) -> list[Shard]:
    """With the lengths that the pack.json of each shard's own folder knows."""
    folders = {shard.path.parent for shard in shards if shard.samples is None}
    summaries = {folder: read_summary(folder) or {"shards": []} for folder in folders}
    known = {
        folder: {shard["name"]: int(shard["samples"]) for shard in summary["shards"]}
        for folder, summary in summaries.items()
    }
    return [
        shard if shard.samples is not None else Shard(shard.path, known[shard.path.parent].get(shard.path.name))
        for shard in shards
    ]


def _lengths(shards: list[Shard]) -> list[int]:
    shards = _noted(shards)
    unknown = [shard.path for shard in shards if shard.samples is None]
    if not unknown:
        return [shard.samples for shard in shards if shard.samples is not None]
    with ThreadPoolExecutor(8) as pool:
        counted = dict(zip(unknown, pool.map(index_length, unknown)))
    return [counted[shard.path] if shard.samples is None else shard.samples for shard in shards]
