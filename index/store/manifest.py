"""What a version of a collection is: one JSON file that names every segment and every byte of it.

It is written last and never changed. Paths in it are plain names checked against a pattern, so a manifest
cannot point outside its collection.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from index.errors import DamagedCollection
from index.store.segment import NAME as SEGMENT_NAME

SCHEMA = 1
METRIC = "inner_product"
VERSION = re.compile(r"\d{6,}")
FILE = "MANIFEST.json"


@dataclass(frozen=True)
class Manifest:
    """One version. `sources` remembers the ids given to each tar, also of tars no longer in it: no id is used
    twice.
    """

    version: str
    parent: str | None  # the version that was current when this one was built
    created: str  # UTC, ISO 8601
    fingerprint: str  # of the embedding space
    dim: int
    rows: int
    texts: int
    members: int  # samples in the tars: rows + skipped
    skipped: dict[str, int]  # reason -> samples
    segments: list[dict[str, Any]]
    sources: dict[str, dict[str, Any]]  # identity of a tar -> {"shard", "first_id", "members"}
    next_id: int
    encoder: dict[str, Any]  # where it came from; not part of the space
    tools: dict[str, str]
    metric: str = METRIC
    normalised: bool = True
    tombstones: str | None = None
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def read_manifest(path: Path) -> Manifest:
    """Raises `DamagedCollection` when the file is absent, torn, of a newer schema, or does not add up."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        schema = stored["schema"]
        if schema != SCHEMA:
            raise DamagedCollection(f"{path} has schema {schema}, this polyview reads {SCHEMA}: update polyview")
        manifest = Manifest(**stored)
        _check(manifest)
    except DamagedCollection:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCollection(f"{path} cannot be read ({error}): publish another version") from error
    return manifest


def _check(m: Manifest) -> None:
    if not VERSION.fullmatch(m.version) or m.metric != METRIC or m.dim < 1:
        raise ValueError(f"version {m.version!r}, metric {m.metric!r}, dim {m.dim}")
    if m.rows + sum(m.skipped.values()) != m.members:
        raise ValueError(f"{m.rows} rows and {sum(m.skipped.values())} skipped are not {m.members} members")
    if m.rows != sum(s["rows"] for s in m.segments):
        raise ValueError(f"{m.rows} rows, but its segments hold {sum(s['rows'] for s in m.segments)}")
    for segment in m.segments:
        if not SEGMENT_NAME.fullmatch(segment["id"]):
            raise ValueError(f"segment {segment['id']!r} is no segment's name")
        if segment["fingerprint"] != m.fingerprint or segment["dim"] != m.dim:
            raise ValueError(f"segment {segment['id']} is of another embedding space")
