"""From embedding units to a new, unpublished version of a collection.

Units whose tar the current version already holds are left alone; the others become new segments behind the
old ones. Another encoder's units need `replace`, which builds every segment anew: vectors of two spaces never
meet.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index.errors import WrongEncoder
from index.store.collection import Collection
from index.store.manifest import Manifest
from index.store.plan import planned_units
from index.store.segment import Piece, write_segment
from index.store.unit import Done
from pretrain.errors import UserError

SEGMENT_ROWS = 1_000_000  # units are joined until a segment holds this many rows


@dataclass(frozen=True)
class Built:
    """What a build did: the new version's manifest, or None where there was nothing to add."""

    manifest: Manifest | None
    added: int  # units
    known: int  # units the collection already held


def build(collection: Collection, embeddings: Path, *, replace: bool = False, partial: bool = False) -> Built:
    """Build a version from the finished units of `embeddings`.

    Raises `WrongEncoder` when the units are of several encoders, or of another one than the collection's
    without `replace`; `UserError` when there are no units, tars without one (unless `partial`), or a tar that
    changed since it was added.
    """
    units, missing = planned_units(embeddings)
    if not units:
        raise UserError(f"{embeddings} holds no finished unit: make some with python -m index embed")
    if missing and not partial:
        raise UserError(
            f"{embeddings}: {len(missing)} tar(s) are not embedded yet ({missing[0]}, …): run the same "
            f"index embed again, it goes on where it stopped; or build what there is with --partial"
        )
    head = _one_space(units, embeddings)
    current = collection.current()
    parent = collection.manifest(current) if current else None
    base = None if replace else parent
    if base is not None:
        _same_space(base, head, collection.folder)
        _refuse_changed(base, units.values())
    fresh = {n: d for n, d in units.items() if base is None or d.source not in _held(base)}
    if not fresh:
        return Built(None, 0, len(units))
    sources, next_id = _give_ids(parent, fresh.values())
    pieces = [Piece(embeddings / "units" / n, d, sources[d.source]["first_id"]) for n, d in fresh.items()]
    new = [write_segment(collection.segments, group) for group in _groups(pieces)]
    segments = (base.segments if base else []) + new
    manifest = _manifest(collection, current, head, segments, sources, next_id)
    collection.add_version(manifest)
    return Built(manifest, len(fresh), len(units) - len(fresh))


def _one_space(units: dict[str, Done], embeddings: Path) -> Done:
    spaces: dict[str, list[str]] = {}
    for name, done in units.items():
        spaces.setdefault(done.fingerprint, []).append(name)
    if len(spaces) > 1:
        found = "; ".join(f"{len(names)} units of encoder {f[:12]}" for f, names in spaces.items())
        raise WrongEncoder(f"{embeddings} mixes embedding spaces: {found}. Give each encoder a folder of its own")
    return next(iter(units.values()))


def _same_space(base: Manifest, head: Done, folder: Path) -> None:
    if base.fingerprint != head.fingerprint or base.dim != head.dim:
        raise WrongEncoder(
            f"{folder} holds vectors of encoder {base.fingerprint[:12]} "
            f"({base.encoder.get('checkpoint')}), "
            f"the units are of {head.fingerprint[:12]} "
            f"({head.encoder.get('checkpoint')}): add --replace to build it anew"
        )


def _refuse_changed(base: Manifest, units: Iterable[Done]) -> None:
    held = {source["shard"]: identity for identity, source in base.sources.items() if identity in _held(base)}
    for done in units:
        if held.get(done.shard, done.source) != done.source:
            raise UserError(f"{done.shard} changed since it was added: add --replace to build the version anew")


def _held(manifest: Manifest) -> set[str]:
    return {source for segment in manifest.segments for source in segment["sources"]}


def _give_ids(parent: Manifest | None, units: Iterable[Done]) -> tuple[dict[str, dict[str, Any]], int]:
    """Ids of a tar's samples are its first id + their place in it; a tar keeps its ids in every later
    version.
    """
    sources = dict(parent.sources) if parent else {}
    next_id = parent.next_id if parent else 0
    for done in sorted(units, key=lambda d: (d.shard, d.source)):
        if done.source not in sources:
            sources[done.source] = {"shard": done.shard, "first_id": next_id, "members": done.members}
            next_id += done.members
    return sources, next_id


def _groups(pieces: Sequence[Piece]) -> list[list[Piece]]:
    groups: list[list[Piece]] = []
    room = 0
    for piece in sorted(pieces, key=lambda p: p.first_id):
        if piece.done.rows > room or not groups:
            groups.append([])
            room = SEGMENT_ROWS
        groups[-1].append(piece)
        room -= piece.done.rows
    return groups


def _manifest(
    collection: Collection,
    parent: str | None,
    head: Done,
    segments: list[dict[str, Any]],
    sources: dict[str, dict[str, Any]],
    next_id: int,
) -> Manifest:
    skipped: dict[str, int] = {}
    for segment in segments:
        for reason, count in segment["skipped"].items():
            skipped[reason] = skipped.get(reason, 0) + count
    versions = collection.versions()
    return Manifest(
        version=f"{int(versions[-1]) + 1 if versions else 1:06d}",
        parent=parent,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        fingerprint=head.fingerprint,
        dim=head.dim,
        rows=sum(s["rows"] for s in segments),
        texts=sum(s["texts"] for s in segments),
        members=sum(s["members"] for s in segments),
        skipped=skipped,
        segments=segments,
        sources=sources,
        next_id=next_id,
        encoder=head.encoder,
        tools={name: importlib.metadata.version(name) for name in ("polyview", "numpy", "pyarrow")},
    )
