"""A published version, opened for search: vectors, images or texts in, ids and scores out.

Exact. Rows are held as float32 where that takes at most 1 GiB, else read from the segments' float16 maps
block by block at each search. An open index goes on with the version it opened, whatever is published
meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from index.errors import BadInput
from index.search.bank import Bank
from index.search.exact import exact_topk
from index.search.filters import Filter, check_filter, rows_matching
from index.store.canary import check_encoder, check_fingerprint
from index.store.collection import Collection
from index.store.segment import Segment
from pretrain.encoder import Encoder
from pretrain.encoder import load as load_encoder
from pretrain.errors import UserError
from pretrain.views.decode import DamagedSample
from pretrain.weights.which import Which

IN_MEMORY = 2**30  # bytes of float32 rows


class Hits(NamedTuple):
    """Best first: scores (Q, k) float32 cosines, ids (Q, k) int64; fewer columns when fewer rows match."""

    scores: np.ndarray
    ids: np.ndarray


class Index:
    """Search in one version. Made by `open_index`; `close` is not needed."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        version: str | None = None,
        encoder: Encoder | str | os.PathLike[str] | None = None,
    ):
        self.folder = Path(folder)
        self.manifest, self.segments = Collection(folder).open(version)
        self._ids = np.concatenate([s.ids for s in self.segments])
        self._by_id = np.argsort(self._ids, kind="stable")
        self._starts = np.cumsum([0, *(len(s.ids) for s in self.segments)])
        self._given = encoder
        if isinstance(encoder, Encoder):
            self._accept(encoder)

    def __len__(self) -> int:
        return len(self._ids)

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder given, or the one at the path noted when embedding; loaded and checked at first use."""
        if isinstance(self._given, Encoder):
            return self._given
        path = self._given or self.manifest.encoder.get("checkpoint")
        if not path or not Path(path).exists():
            where = f"its encoder is no longer at {path}" if path else "it does not say where its encoder is"
            raise UserError(f"{self.folder}: {where}; name the checkpoint with --encoder")
        encoder = load_encoder(Path(path), weights=_which(self.manifest.encoder))
        self._accept(encoder)
        return encoder

    def search(self, queries: Any, k: int = 10, filter: Filter | None = None) -> Hits:
        """The `k` nearest images by cosine to each query.

        queries: vectors (Q, D) or (D,) of any length but zero; texts (a str or a list of them); or images
        (bytes, Path, PIL image, uint8 (H, W, 3), or a list). filter: `{"label": 3}`, see
        `index.search.filters`.

        Raises `BadInput` for vectors of another width, not finite or of length zero, k < 1, or an unknown
        filter.
        """
        vectors = self._vectors(queries)
        if filter is None:
            scores, rows = exact_topk(vectors, self._bank, k)
            return Hits(scores, self._ids[rows])
        allowed = self._allowed(filter)
        scores, rows = exact_topk(vectors, self.vectors(allowed), k)
        return Hits(scores, self._ids[allowed[rows]])

    def items(self, ids: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Metadata of each id: id, key, shard, captions, label, json and where the original lies."""
        return [
            {"id": int(i), **segment.meta.slice(row, 1).to_pylist()[0]}
            for i, (segment, row) in zip(ids, map(self._place, self.rows_of(ids)))
        ]

    def thumbnail(self, id: int) -> bytes:
        """A small JPEG of one image."""
        segment, row = self._place(int(self.rows_of([id])[0]))
        return segment.thumbs.read(row)

    def id_of_key(self, key: str) -> int:
        """The id of the image with this key; the first where several tars have it."""
        found = self._allowed({"key": key})
        if not len(found):
            raise UserError(f"{self.folder} holds no image with key {key!r}")
        return int(self._ids[found[0]])

    def rows_of(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Row of each id in the version; UserError for an id that is not in it."""
        try:
            asked = np.asarray(ids, np.int64).reshape(-1)
        except OverflowError:
            raise BadInput(f"ids are 64-bit integers, given {ids!r}") from None
        places = np.searchsorted(self._ids, asked, sorter=self._by_id)
        rows = self._by_id[np.minimum(places, len(self) - 1)] if len(self) else places
        wrong = asked[self._ids[rows] != asked] if len(self) else asked
        if len(wrong):
            raise UserError(
                f"{self.folder} holds no image with id {wrong[0]} (ids go up to {self.manifest.next_id - 1})"
            )
        return rows

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of rows, (M, D) float32."""
        out = np.empty((len(rows), self.manifest.dim), np.float32)
        part_of = np.searchsorted(self._starts, rows, side="right") - 1
        for i in np.unique(part_of):
            here = part_of == i
            out[here] = self.segments[i].emb[rows[here] - self._starts[i]]
        return out

    @cached_property
    def _bank(self) -> Bank:
        parts = [s.emb for s in self.segments if len(s.emb)] or [np.empty((0, self.manifest.dim), np.float16)]
        if sum(p.size for p in parts) * 4 <= IN_MEMORY:
            parts = [np.concatenate([p.astype(np.float32) for p in parts])]
        return Bank(parts)

    def _accept(self, encoder: Encoder) -> None:
        check_fingerprint(encoder, self.manifest.fingerprint, self.manifest.dim, str(self.folder))
        check_encoder(encoder, self.segments)

    def _place(self, row: int) -> tuple[Segment, int]:
        i = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.segments[i], int(row - self._starts[i])

    def _allowed(self, wanted: Filter) -> np.ndarray:
        check_filter(wanted)
        found = [rows_matching(s.meta, wanted) + start for s, start in zip(self.segments, self._starts)]
        return np.concatenate([np.empty(0, np.int64), *found]).astype(np.int64)

    def _vectors(self, queries: Any) -> np.ndarray:
        if isinstance(queries, str):
            return self.encoder.encode_text([queries])
        if hasattr(queries, "detach"):
            queries = queries.detach().cpu().float().numpy()
        if isinstance(queries, np.ndarray) and queries.dtype != np.uint8:
            return _unit_rows(queries, self.manifest.dim)
        if not isinstance(queries, list | tuple):
            queries = [queries]
        if not queries:
            raise BadInput("nothing to search for: an empty list")
        if all(isinstance(q, str) for q in queries):
            return self.encoder.encode_text(list(queries))
        if all(isinstance(q, int | float | np.floating) for q in queries):
            return _unit_rows(np.asarray(queries, np.float32), self.manifest.dim)
        try:
            return self.encoder.encode_image(list(queries))
        except DamagedSample as damage:
            raise BadInput(f"queries: {damage.reason}") from None


def _which(noted: Mapping[str, Any]) -> Which:
    """Which of a checkpoint's weights embedded a collection; older ones say `teacher: true`."""
    return noted.get("weights") or ("teacher" if noted.get("teacher") else "model")


def _unit_rows(vectors: np.ndarray, dim: int) -> np.ndarray:
    vectors = np.atleast_2d(vectors)
    if vectors.dtype.kind != "f" or vectors.ndim != 2 or vectors.shape[1] != dim:
        raise BadInput(f"queries: expected float vectors {dim} wide, got {vectors.dtype} {vectors.shape}")
    length = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(length[:, 0]) & (length[:, 0] > 0)))
    if len(bad):
        raise BadInput(f"queries: row {bad[0]} is not finite or has length zero")
    return (vectors / length).astype(np.float32)
