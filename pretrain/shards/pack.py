"""Entries into shards: tars of samples, the index of each, and `pack.json`, which says what is there.

The same input and options give the same bytes: order by a hash of the names, times and owners zero. All is
written into OUT.partial and renamed to OUT when it is complete, so that an interrupted pack is never taken
for a whole one. Image bytes are never changed; the extension is that of the true format, whatever the file
was called.

A packed folder: `0.tar`, `1.tar`, … with their indexes, `classnames.txt` (line = label), `nshards.txt` (for
CLIP_benchmark), `pack.json`. With a holdout, two of these: `train/` and `test/`. At the top `skipped.jsonl`
(what was left out and why) and `renamed.jsonl` (key and original name, where they differ).
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.durable import write_text
from pretrain.errors import UserError
from pretrain.shards.entries import Entry, Listing, Ref, Skip, assign_keys, hash_of
from pretrain.shards.images import BadImage
from pretrain.shards.index import ShardIndex, load_index
from pretrain.shards.source import SUMMARY

PACK_VERSION = 1
LOCK = ".packing"  # marks a folder as ours and unfinished

Check = Callable[[bytes], str]  # image bytes -> extension, or BadImage


@dataclass(frozen=True)
class PackOptions:
    """How to cut an input into shards."""

    shard_samples: int = 10_000
    shard_bytes: int = 1 << 30
    shuffle_seed: int | None = 0  # None: sorted by name
    holdout: int = 0  # samples put aside into test/
    limit: int | None = None  # samples taken at most
    threads: int = 8

    def __post_init__(self) -> None:
        for name in ("shard_samples", "shard_bytes", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, is {getattr(self, name)}")
        if self.holdout < 0 or (self.limit is not None and self.limit < 1):
            raise UserError("holdout must be at least 0, limit at least 1")


RENAMED = "renamed.jsonl"


class Packed(NamedTuple):
    """One folder of shards that was written."""

    folder: Path
    samples: int
    shards: int
    bytes: int


def pack(
    listing: Listing,
    out: Path,
    options: PackOptions,
    check: Check,
    *,
    advance: Callable[[], object] = lambda: None,
) -> tuple[list[Packed], list[Skip]]:
    """Write a listing as shards into `out`, which must not exist or be empty. `advance` is called once an
    entry.

    Returns what was written and everything that was skipped. Raises UserError when nothing is left to pack.
    """
    if not listing.entries:
        raise UserError("nothing to pack: the input has no samples")
    with unfinished(out) as partial:
        keys = assign_keys(entry.name for entry in listing.entries)
        skips = list(listing.skips)
        done = []
        for name, entries in _splits(_ordered(listing.entries, options), options).items():
            writer = ShardWriter(partial / name, listing, options)
            for entry, outcome in _read_all(entries, check, options.threads):
                advance()
                if isinstance(outcome, Skip):
                    skips.append(outcome)
                else:
                    writer.add(keys[entry.name], outcome)
            done.append(writer.finish()._replace(folder=out / name))
        if not sum(split.samples for split in done):
            raise UserError(f"nothing to pack: all {len(listing.entries)} samples were skipped ({_counted(skips)})")
        write_lines(partial / "skipped.jsonl", (dict(skip._asdict()) for skip in skips))
        renamed = ((key, name) for name, key in keys.items() if name.rpartition(".")[0] != key)
        write_lines(partial / RENAMED, ({"key": key, "name": name} for key, name in renamed))
    return done, skips


def count_reasons(skips: Iterable[Skip]) -> dict[str, int]:
    """How many skips there are of each reason, most first."""
    return dict(Counter(skip.reason for skip in skips).most_common())


def write_summary(folder: Path, indexes: list[tuple[str, ShardIndex]], extra: dict[str, Any]) -> None:
    """`pack.json` of a folder; `indexes` by the shard's name relative to it. Atomic."""
    shards: list[dict[str, Any]] = [
        {
            "name": name,
            "samples": len(index),
            "bytes": index.path.stat().st_size,
            "damaged": len(index.problems),
        }
        for name, index in indexes
    ]
    extensions: Counter[str] = Counter()
    for _, index in indexes:
        extensions.update(index.extension_counts())
    summary = {
        "version": PACK_VERSION,
        "samples": sum(shard["samples"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "extensions": dict(sorted(extensions.items())),
        **extra,
        "shards": shards,
    }
    write_text(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` at the end, or is removed when something goes wrong."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: choose another --out, or remove it first")
    partial = out.with_name(out.name + ".partial")
    if partial.exists() and not (partial / LOCK).exists():
        raise UserError(f"{partial} is in the way: it is where {out} is written until it is complete; remove it")
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another pack is writing {partial}") from error
        _clear(partial)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        (partial / LOCK).unlink()
        os.rename(partial, out)


def _clear(partial: Path) -> None:
    """Remove what an earlier, killed pack left."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _ordered(entries: list[Entry], options: PackOptions) -> list[Entry]:
    """Shuffled by a hash of seed and name: the same everywhere, and an image more moves no other."""
    if options.shuffle_seed is None:
        ordered = sorted(entries, key=lambda e: e.name)
    else:
        ordered = sorted(entries, key=lambda e: (hash_of("order", options.shuffle_seed, e.name), e.name))
    return ordered[: options.limit]


def _splits(entries: list[Entry], options: PackOptions) -> dict[str, list[Entry]]:
    """By folder name: all in the top folder, or train and test."""
    if not options.holdout:
        return {"": entries}
    if options.holdout >= len(entries):
        raise UserError(f"--holdout {options.holdout} leaves nothing to train on: there are {len(entries)} samples")
    ranked = sorted((hash_of("holdout", entry.name), entry.name) for entry in entries)
    test = {name for _, name in ranked[: options.holdout]}
    return {
        "train": [entry for entry in entries if entry.name not in test],
        "test": [entry for entry in entries if entry.name in test],
    }


Sample = dict[str, bytes]  # members by extension


def _read(entry: Entry, check: Check) -> Sample | Skip:
    try:
        image = entry.image.read()
        sample = {check(image): image}
        for extension, part in entry.parts.items():
            sample.setdefault(extension, part.read() if isinstance(part, Ref) else part)
        return sample
    except BadImage as bad:
        return Skip(entry.name, bad.reason, bad.detail)
    except FileNotFoundError:
        return Skip(entry.name, "missing image", str(entry.image.path))
    except OSError as error:
        return Skip(entry.name, "unreadable file", str(error))


def _read_all(entries: list[Entry], check: Check, threads: int) -> Iterator[tuple[Entry, Sample | Skip]]:
    """Read and check in threads, given back in order; at most four a thread are held in memory."""
    waiting: deque[tuple[Entry, Future[Sample | Skip]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for entry in entries:
                waiting.append((entry, pool.submit(_read, entry, check)))
                if len(waiting) > 4 * threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


class ShardWriter:
    """Samples one after another into tars of one folder."""

    def __init__(self, folder: Path, listing: Listing, options: PackOptions):
        folder.mkdir(exist_ok=True)
        self.folder, self.listing, self.options = folder, listing, options
        self.tar: tarfile.TarFile | None = None
        self.paths: list[Path] = []
        self.in_shard = 0

    def add(self, key: str, sample: Sample) -> None:
        size = sum(1024 + len(data) for data in sample.values())
        if self.tar and (
            self.in_shard >= self.options.shard_samples or self.tar.offset + size > self.options.shard_bytes
        ):
            self.cut()
        if self.tar is None:
            self.paths.append(self.folder / f"{len(self.paths)}.tar")
            # GNU format: no limit on sizes, and no times beyond the header's (set to 0)
            self.tar = tarfile.open(  # noqa: SIM115 - closed when the shard is full
                self.paths[-1], "w", format=tarfile.GNU_FORMAT, encoding="utf-8"
            )
        for extension in sorted(sample):
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(sample[extension])
            self.tar.addfile(member, io.BytesIO(sample[extension]))
        self.tar.members = []  # type: ignore[attr-defined]  # it remembers every member: a long shard's would add up
        self.in_shard += 1

    def cut(self) -> None:
        """End the tar that is being written; the next sample begins another."""
        if self.tar:
            self.tar.close()
        self.tar, self.in_shard = None, 0

    def finish(self) -> Packed:
        """Close the last tar, index all, and write pack.json last."""
        self.cut()
        indexes = [(path.name, load_index(path)) for path in self.paths]
        if self.listing.classnames:
            lines = [" ".join(name.split()) or "_" for name in self.listing.classnames]  # a line a label, none blank
            (self.folder / "classnames.txt").write_text("\n".join(lines) + "\n")
        (self.folder / "nshards.txt").write_text(f"{len(self.paths)}\n")
        extra = {
            "format": self.listing.format,
            "classes": len(self.listing.classnames),
            "options": self._options(),
        }
        write_summary(self.folder, indexes, extra)
        size = sum(path.stat().st_size for path in self.paths)
        return Packed(self.folder, sum(len(index) for _, index in indexes), len(indexes), size)

    def _options(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self.options).items() if name != "threads"}


def _counted(skips: list[Skip]) -> str:
    return ", ".join(f"{reason}: {n}" for reason, n in count_reasons(skips).items())


def write_lines(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """JSON, a line a record; no file where there are none."""
    lines = [json.dumps(record) + "\n" for record in records]
    if lines:
        path.write_text("".join(lines))
