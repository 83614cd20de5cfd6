"""Is every sample of a shard readable: the tar's headers always, what is in the members on request.

Headers cost microseconds a sample and find: a tar cut short, damaged headers, repeated keys, empty images,
samples without an image. With `decode` every byte is read: images are decoded, captions must be UTF-8,
classes numbers, `.json` JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from pretrain.errors import UserError
from pretrain.shards.entries import image_part
from pretrain.shards.grouping import Parts
from pretrain.shards.images import BadImage
from pretrain.shards.index import ShardIndex, build_index

Decode = Callable[[bytes], object]  # raises BadImage; a top-level function, since it goes to other processes


class Problem(NamedTuple):
    """`key` is empty when it is the shard's."""

    shard: Path
    key: str
    reason: str


class Report(NamedTuple):
    """One shard: how many samples can be read, and what is wrong."""

    shard: Path
    samples: int
    problems: list[Problem]


def verify_shard(shard: Path, decode: Decode | None = None, expected: int | None = None) -> Report:
    """Check one shard against itself, and against the number of samples that pack.json notes. Never raises
    for what is wrong with the shard."""
    try:
        index = build_index(shard)
    except UserError as error:
        return Report(shard, 0, [Problem(shard, "", str(error))])
    found = list(index.problems)
    if expected is not None and expected != len(index):
        found.append(("", f"{len(index)} samples where pack.json notes {expected}"))
    found += _members(index, decode)
    return Report(shard, len(index), [Problem(shard, key, reason) for key, reason in found])


def verify_shards(
    shards: Sequence[Path],
    decode: Decode | None = None,
    expected: Mapping[Path, int | None] | None = None,
    workers: int | None = None,
) -> Iterator[Report]:
    """`verify_shard` of many, as they are done, on `workers` processes (all cores by default)."""
    expected = expected or {}
    workers = min(workers or os.cpu_count() or 1, len(shards))
    if workers < 2:
        yield from (verify_shard(shard, decode, expected.get(shard)) for shard in shards)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(verify_shard, shard, decode, expected.get(shard)) for shard in shards]
        yield from (future.result() for future in as_completed(waiting))


def _members(index: ShardIndex, decode: Decode | None) -> Iterator[tuple[str, str]]:
    """(key, reason) of what is wrong inside the samples."""
    with open(index.path, "rb") as tar:
        for key, parts in zip(index.keys, index.block(0, len(index))):
            image = image_part(parts)
            if image is None:
                yield key, f"no image: it has only {', '.join('.' + extension for extension in parts)}"
            elif parts[image][1] == 0:
                yield key, f"the .{image} is zero bytes"
            elif decode:
                yield from ((key, reason) for reason in _contents(tar.fileno(), parts, image, decode))


def _contents(fd: int, parts: Parts, image: str, decode: Decode) -> Iterator[str]:
    """What is wrong with the bytes of one sample."""
    for extension, (offset, size) in parts.items():
        data = os.pread(fd, size, offset)
        try:
            if extension == image:
                decode(data)
            elif extension == "txt":
                data.decode("utf-8")
            elif extension == "cls":
                int(data)
            elif extension == "json":
                json.loads(data)
        except BadImage as bad:
            yield f".{extension}: {bad}"
        except UnicodeDecodeError as error:
            yield f".{extension} is not UTF-8 (byte {error.start})"
        except ValueError as error:
            yield f".{extension}: {error}"
