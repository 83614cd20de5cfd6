"""A segment: rows of one embedding space in an immutable folder whose name is a hash of its files.

`s-<hash>/`: emb.npy (N, D) float16, the truth all else is derived from; ids.npy (N,) int64; texts.npy (M, D)
and text_rows.npy (M,), captions and the row of their image; meta.parquet; skipped.parquet; thumbs.bin,
thumbs.npy; canaries.parquet, 32 originals as bytes. What each file must be (bytes, sha256) stands in the
version's manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from index.errors import DamagedCollection
from index.store.durable import commit_folder, describe, new_folder, sha256, write_json
from index.store.tables import CANARIES, read_table, write_table
from index.store.thumbs import Thumbs
from index.store.unit import CANARY_ROWS, Done

NAME = re.compile(r"s-[0-9a-f]{32}")
FILE = re.compile(r"[a-z_]+\.(npy|parquet|bin|json)")


@dataclass(frozen=True)
class Piece:
    """A unit on its way into a segment; `first_id` is the id of its tar's first sample."""

    folder: Path
    done: Done
    first_id: int


class Segment:
    """An open segment: arrays are memory maps, tables are read when asked for."""

    def __init__(self, folder: Path, record: dict[str, Any]):
        self.folder, self.record = folder, record
        self.name: str = record["id"]
        self.emb = self._array("emb.npy", np.float16, 2)  # (N, D)
        self.ids = self._array("ids.npy", np.int64, 1)  # (N,)
        if len(self.emb) != record["rows"] or len(self.ids) != record["rows"]:
            raise DamagedCollection(f"{folder}: {len(self.emb)} vectors, {len(self.ids)} ids, {record['rows']} rows")

    @cached_property
    def texts(self) -> np.ndarray:
        """(M, D) float16: the captions' vectors; M = 0 where the encoder has no text tower."""
        return self._array("texts.npy", np.float16, 2)

    @cached_property
    def text_rows(self) -> np.ndarray:
        """(M,) int64: the row of each caption's image."""
        return self._array("text_rows.npy", np.int64, 1)

    @cached_property
    def meta(self) -> pa.Table:
        return read_table(self.folder / "meta.parquet")

    @cached_property
    def thumbs(self) -> Thumbs:
        return Thumbs(self.folder)

    def canaries(self) -> tuple[np.ndarray, list[bytes]]:
        """(rows, original image bytes) of the kept samples."""
        table = read_table(self.folder / "canaries.parquet")
        return table["row"].to_numpy(), table["image"].to_pylist()

    def _array(self, name: str, dtype: type, ndim: int) -> np.ndarray:
        try:
            found = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DamagedCollection(f"{self.folder / name} cannot be read: {error}") from error
        if found.dtype != dtype or found.ndim != ndim:
            raise DamagedCollection(f"{self.folder / name}: {found.dtype} {found.shape} is not what it should be")
        return found


def verify_files(folder: Path, files: Sequence[dict[str, Any]], *, digests: bool) -> None:
    """Raise `DamagedCollection`, naming the file, unless each has its bytes and (`digests`) its sha256."""
    for file in files:
        path = folder / file["path"]
        if not FILE.fullmatch(file["path"]):
            raise DamagedCollection(f"{folder}: the manifest names {file['path']!r}, which no segment has")
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DamagedCollection(f"{path} is missing ({error.strerror}): {REMEDY}") from error
        if size != file["bytes"]:
            raise DamagedCollection(f"{path} has {size} bytes instead of {file['bytes']}: {REMEDY}")
        if digests and sha256(path) != file["sha256"]:
            raise DamagedCollection(f"{path} was altered (its sha256 is not the manifest's): {REMEDY}")


REMEDY = "restore it from a copy, or build the version again from its embeddings with --replace"


def write_segment(segments: Path, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Join units into one segment; its record for a manifest. The same units give the same segment."""
    with new_folder(segments) as folder:
        _join_vectors(folder, pieces)
        _join_tables(folder, pieces)
        _join_thumbs(folder, pieces)
        head = _head(pieces)
        write_json(folder / "segment.json", head)
        files = describe(folder)
        name = "s-" + hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:32]
        if not commit_folder(folder, segments / name):
            _mend(folder, segments / name, files)
    return {"id": name, **head, "files": files}


def _mend(fresh: Path, final: Path, files: Sequence[dict[str, Any]]) -> None:
    """A segment of this name is there: leave it when whole, else put the fresh one in its place."""
    try:
        verify_files(final, files, digests=True)
    except DamagedCollection:
        os.rename(final, final.with_name(f".tmp-damaged-{os.urandom(4).hex()}"))
        commit_folder(fresh, final)


def _head(pieces: Sequence[Piece]) -> dict[str, Any]:
    skipped: dict[str, int] = {}
    for piece in pieces:
        for reason, count in piece.done.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    return {
        "kind": "images",
        "fingerprint": pieces[0].done.fingerprint,
        "dim": pieces[0].done.dim,
        "rows": sum(p.done.rows for p in pieces),
        "texts": sum(p.done.texts for p in pieces),
        "members": sum(p.done.members for p in pieces),
        "skipped": skipped,
        "id_range": [min(p.first_id for p in pieces), max(p.first_id + p.done.members for p in pieces)],
        "sources": [p.done.source for p in pieces],
    }


def _join_vectors(folder: Path, pieces: Sequence[Piece]) -> None:
    rows, texts, dim = sum(p.done.rows for p in pieces), sum(p.done.texts for p in pieces), pieces[0].done.dim
    emb = _new_array(folder / "emb.npy", np.float16, (rows, dim))
    ids = _new_array(folder / "ids.npy", np.int64, (rows,))
    text = _new_array(folder / "texts.npy", np.float16, (texts, dim))
    text_rows = _new_array(folder / "text_rows.npy", np.int64, (texts,))
    row = at = 0
    for piece in pieces:
        members = read_table(piece.folder / "meta.parquet", ["member"])["member"].to_numpy()
        emb[row : row + piece.done.rows] = _load(piece, "images.npy", piece.done.rows)
        ids[row : row + piece.done.rows] = members + piece.first_id
        text[at : at + piece.done.texts] = _load(piece, "texts.npy", piece.done.texts)
        text_rows[at : at + piece.done.texts] = _load(piece, "text_rows.npy", piece.done.texts) + row
        row, at = row + piece.done.rows, at + piece.done.texts
    for array in (emb, ids, text, text_rows):
        if isinstance(array, np.memmap):
            array.flush()


def _new_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    if 0 in shape:  # an empty file cannot be mapped
        np.save(path, np.empty(shape, dtype))
        return np.empty(shape, dtype)
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def _load(piece: Piece, name: str, rows: int) -> np.ndarray:
    try:
        found = np.load(piece.folder / name, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DamagedCollection(
            f"{piece.folder / name} cannot be read ({error}): remove the unit, embed again"
        ) from error
    if len(found) != rows or (found.ndim == 2 and rows and found.shape[1] != piece.done.dim):
        raise DamagedCollection(f"{piece.folder / name}: {found.shape} is not what DONE.json says: embed again")
    return found


def _join_tables(folder: Path, pieces: Sequence[Piece]) -> None:
    for name in ("meta.parquet", "skipped.parquet"):
        table = pa.concat_tables([read_table(p.folder / name) for p in pieces])
        write_table(folder / name, table, table.schema)
    write_table(folder / "canaries.parquet", _spread_canaries(pieces), CANARIES)


def _spread_canaries(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """At most 32 originals, taken in turn from all units."""
    kept, row = [], 0
    for piece in pieces:
        for rank, original in enumerate(read_table(piece.folder / "canaries.parquet").to_pylist()):
            kept.append((rank, {"row": original["row"] + row, "image": original["image"]}))
        row += piece.done.rows
    return [original for _, original in sorted(kept, key=lambda pair: pair[0])[:CANARY_ROWS]]


def _join_thumbs(folder: Path, pieces: Sequence[Piece]) -> None:
    offsets = [np.zeros(1, np.int64)]
    with open(folder / "thumbs.bin", "wb") as out:
        for piece in pieces:
            start = out.tell()
            with open(piece.folder / "thumbs.bin", "rb") as file:
                shutil.copyfileobj(file, out)
            offsets.append(np.load(piece.folder / "thumbs.npy", allow_pickle=False)[1:] + start)
    np.save(folder / "thumbs.npy", np.concatenate(offsets))
