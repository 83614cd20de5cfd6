"""The manifest: which tensors a checkpoint holds, in which ranges of which files, and what the run says of
itself.

Every rank's part is a small manifest of what that rank wrote; `merge` joins the parts and refuses anything
but every element exactly once. Both are JSON with a SHA-256 of their own content, so that a damaged list is
not mistaken for a list. The tensors' bytes are guarded by a CRC-32 a range: it finds every short error and
runs at gigabytes a second; it is not meant against forgery.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pretrain.checkpoint.errors import CheckpointError, CheckpointTornError, unreadable
from pretrain.checkpoint.layout import DTYPES, MANIFEST
from pretrain.checkpoint.store import Store
from pretrain.patience import patiently

FORMAT = "polyview-checkpoint"
FORMAT_VERSION = 1


class Range(NamedTuple):
    """`length` elements from `offset` of a tensor's row-major elements, and where they are."""

    offset: int
    length: int
    file: str
    crc32: int


@dataclass(frozen=True)
class Entry:
    """One tensor: its type (safetensors' name), full shape, and ranges in order of offset."""

    dtype: str
    shape: tuple[int, ...]
    ranges: tuple[Range, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """All of a checkpoint but the bytes. `files` maps name -> size in bytes; `meta` is the run's own JSON; `run`: the
    id of the run that wrote it, None where it has none.
    """

    step: int
    attempt: str
    world: int
    files: Mapping[str, int]
    tensors: Mapping[str, Entry]
    meta: Mapping[str, Any]
    run: str | None = None


def seal(body: dict[str, Any]) -> bytes:
    """JSON of `body` with a digest over it. ValueError for NaN, TypeError for what JSON cannot hold."""
    # what a reader will see, and so what the digest covers
    body = json.loads(json.dumps(body, allow_nan=False))
    return json.dumps({**body, "sha256": _digest(body)}, allow_nan=False).encode()


def unseal(data: bytes, where: Store) -> dict[str, Any]:
    """The body that `seal` wrote; CheckpointError, naming `where`, for anything else."""
    try:
        body = json.loads(data)
        stored = body.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{where}: damaged ({type(e).__name__}: {e}); use another checkpoint") from e
    if stored != _digest(body):
        raise CheckpointError(f"{where}: damaged (its content does not match its SHA-256); use another checkpoint")
    return body


def encode_tensors(tensors: Mapping[str, Entry]) -> dict[str, Any]:
    return {
        name: {"dtype": e.dtype, "shape": list(e.shape), "ranges": [list(r) for r in e.ranges]}
        for name, e in tensors.items()
    }


def decode_tensors(raw: Mapping[str, Any]) -> dict[str, Entry]:
    return {
        name: Entry(e["dtype"], tuple(e["shape"]), tuple(Range(*r) for r in e["ranges"])) for name, e in raw.items()
    }


def encode_manifest(manifest: Manifest) -> bytes:
    return seal(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": manifest.step,
            "run": manifest.run,
            "attempt": manifest.attempt,
            "world": manifest.world,
            "meta": dict(manifest.meta),
            "files": dict(manifest.files),
            "range_fields": list(Range._fields),
            "tensors": encode_tensors(manifest.tensors),
        }
    )


def read_manifest(folder: Store) -> Manifest:
    """Parse and check a step folder's manifest.

    Raises CheckpointTornError if there is none, CheckpointError if it is damaged or of another format.
    """
    where = folder / MANIFEST
    try:
        data = patiently(folder.read, MANIFEST)
    except FileNotFoundError as e:
        raise CheckpointTornError(
            f"{folder}: not a whole checkpoint (no {MANIFEST}: its save was interrupted or is still "
            f"going on); use another step"
        ) from e
    except OSError as e:
        raise unreadable(f"{where}:", e) from e
    body = unseal(data, where)
    if body.get("format") != FORMAT or body.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format {body.get('format')!r} version {body.get('format_version')!r}; this polyview "
            f"reads {FORMAT!r} version {FORMAT_VERSION}: use the polyview that wrote it"
        )
    tensors = decode_tensors(body["tensors"])
    step, attempt, world, run = body["step"], body["attempt"], body["world"], body.get("run")
    return Manifest(step, attempt, world, body["files"], tensors, body["meta"], run)


def merge(parts: Iterable[Mapping[str, Entry]], where: Store) -> dict[str, Entry]:
    """Join what the ranks wrote. Raises CheckpointError unless every tensor is there exactly once."""
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    ranges: dict[str, list[Range]] = {}
    for part in parts:
        for name, entry in part.items():
            kind = kinds.setdefault(name, (entry.dtype, entry.shape))
            if kind != (entry.dtype, entry.shape):
                raise CheckpointError(
                    f"{where}: the ranks disagree about tensor {name!r}: {kind} and {(entry.dtype, entry.shape)}"
                )
            ranges.setdefault(name, []).extend(entry.ranges)
    return {name: _covered(name, Entry(*kinds[name], tuple(sorted(ranges[name]))), where) for name in kinds}


def _covered(name: str, entry: Entry, where: Store) -> Entry:
    """`entry` if its ranges are [0, numel) without gap or overlap."""
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"{where}: tensor {name!r} is of unknown type {entry.dtype!r}")
    if entry.numel == 0:
        return Entry(entry.dtype, entry.shape, entry.ranges[:1])  # several ranks may hold "nothing" of it
    place = 0
    for r in entry.ranges:
        if r.offset != place:
            missing = r.offset > place
            lo, hi = (place, r.offset) if missing else (r.offset, min(place, r.offset + r.length))
            fault = "are missing" if missing else "were written twice"
            raise CheckpointError(f"{where}: tensor {name!r}: elements [{lo}, {hi}) {fault}")
        place += r.length
    if place != entry.numel:
        raise CheckpointError(f"{where}: tensor {name!r}: elements [{place}, {entry.numel}) are missing")
    return entry


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
