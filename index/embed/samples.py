"""Samples of one tar for embedding: image and captions decoded ahead by threads, what is unusable named with
a reason.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from index.store.thumbs import thumbnail
from pretrain.encoder import Encoder
from pretrain.errors import UserError
from pretrain.reader.samples import CLASS_EXTENSION, NO_LABEL, captions, label
from pretrain.shards.entries import image_part
from pretrain.shards.index import ShardIndex
from pretrain.views.decode import DamagedSample, decode

AHEAD = 64  # decoded samples that may wait


@dataclass(frozen=True)
class Sample:
    """One sample ready for the towers."""

    member: int  # place in the tar
    key: str
    extension: str
    offset: int
    size: int
    data: bytes  # the image as it stands in the tar
    pixels: torch.Tensor  # (3, S, S) uint8
    thumb: bytes
    captions: list[str]
    label: int
    json: str


@dataclass(frozen=True)
class Skipped:
    member: int
    key: str
    reason: str


def samples(index: ShardIndex, encoder: Encoder, threads: int) -> Iterator[Sample | Skipped]:
    """Every sample of a tar in file order, as a `Sample` or as `Skipped`."""
    fd = _open(index.path)
    waiting: deque[Future[Sample | Skipped]] = deque()
    try:
        with ThreadPoolExecutor(threads) as pool:
            for row in range(len(index)):
                waiting.append(pool.submit(_sample, fd, index, row, encoder))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        os.close(fd)


def _open(tar: Path) -> int:
    try:
        return os.open(tar, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"shard {tar} cannot be read: {error.strerror}") from error


def _sample(fd: int, index: ShardIndex, row: int, encoder: Encoder) -> Sample | Skipped:
    key = index.key(row)
    try:
        return _decoded(fd, index.members(row), row, key, encoder)
    except DamagedSample as damage:
        return Skipped(row, key, damage.reason)


def _decoded(fd: int, places: dict[str, tuple[int, int]], row: int, key: str, encoder: Encoder) -> Sample:
    extension = image_part(places)
    if extension is None:
        raise DamagedSample("no image")
    data = _read(fd, *places[extension])
    pixels = decode(data)
    rest = {e: memoryview(_read(fd, *places[e])) for e in ("txt", CLASS_EXTENSION, "json") if e in places}
    return Sample(
        row,
        key,
        extension,
        *places[extension],
        data,
        encoder.preprocess(pixels),
        thumbnail(pixels),
        _captions(rest),
        _label(rest),
        bytes(rest.get("json", b"")).decode("utf-8", "replace"),
    )


def _captions(members: dict[str, memoryview]) -> list[str]:
    """The captions; an image without a readable one is still worth finding."""
    try:
        return captions(members, "txt")
    except DamagedSample:
        return []


def _label(members: dict[str, memoryview]) -> int:
    try:
        return label(members)
    except DamagedSample:
        return NO_LABEL


def _read(fd: int, offset: int, size: int) -> bytes:
    data = os.pread(fd, size, offset)
    if len(data) != size:
        raise DamagedSample("cut short: the tar ends inside it")
    return data
