"""Embed shards: one tar, one unit, whole or absent. A killed job loses at most the tar it was in.

Tars are dealt to processes by RANK and WORLD_SIZE (torchrun, accelerate) or SLURM_PROCID and SLURM_NTASKS;
the processes never talk, a job array does as well. A tar whose unit exists is passed over. Not kept: an image
whose vector is not finite or has no length (`Encoder` gives unit rows); it is counted as skipped.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from index.embed.samples import Sample, Skipped, samples
from index.store.plan import extend_plan
from index.store.unit import CANARY_ROWS, Done, UnitRows, read_done, tar_identity, unit_name, write_unit
from pretrain.encoder import Encoder
from pretrain.errors import UserError
from pretrain.shards.index import load_index
from pretrain.weights.which import Which

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What to embed, and with how much at once."""

    batch: int = 64
    texts: bool = True
    threads: int = 2
    checkpoint: str = ""  # kept as provenance
    weights: Which = "model"  # likewise: which of the checkpoint's weights was the encoder


@dataclass
class Counts:
    """What a process did. rows + skipped == members."""

    tars: int = 0
    known: int = 0  # tars that were done before
    members: int = 0
    rows: int = 0
    texts: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, done: Done, *, known: bool) -> None:
        self.tars += 1
        self.known += known
        self.members += done.members
        self.rows += done.rows
        self.texts += done.texts
        self.skipped.update(done.skipped)


def rank_and_world(env: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process's place among those that share the work; (0, 1) when alone."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in env and world in env:
            if not (env[rank].isdigit() and env[world].isdigit() and int(env[rank]) < int(env[world])):
                raise UserError(f"{rank}={env[rank]} and {world}={env[world]} name no process of a group")
            return int(env[rank]), int(env[world])
    return 0, 1


def embed_shards(
    encoder: Encoder, tars: Iterable[Path], out: Path, options: Options, *, rank: int = 0, world: int = 1
) -> Counts:
    """Embed this process's share of `tars` into `out`; what was done before is counted, not repeated."""
    identities = {str(tar.resolve()): tar_identity(tar) for tar in tars}
    extend_plan(out, encoder.fingerprint, identities)
    counts = Counts()
    for path, identity in list(identities.items())[rank::world]:
        unit = out / "units" / unit_name(identity, encoder.fingerprint, options.texts)
        before = read_done(unit)
        done = before or _embed_tar(encoder, Path(path), identity, unit, options)
        counts.add(done, known=before is not None)
        log.info("%s: %d of %d samples embedded%s", path, done.rows, done.members, " before" if before else "")
    return counts


def _embed_tar(encoder: Encoder, tar: Path, identity: str, unit: Path, options: Options) -> Done:
    index = load_index(tar)
    rows = _rows(encoder, tar.name, samples(index, encoder, options.threads), options)
    done = Done(
        source=identity,
        shard=str(tar),
        fingerprint=encoder.fingerprint,
        dim=encoder.dim,
        members=len(index),
        rows=len(rows.images),
        texts=len(rows.texts),
        skipped=dict(Counter(s["reason"].partition(":")[0] for s in rows.skipped)),
        encoder={
            "checkpoint": options.checkpoint,
            "weights": options.weights,
            "image_size": encoder.image_size,
            "has_text": encoder.has_text,
        },
    )
    if tar_identity(tar) != identity:
        raise UserError(f"{tar} changed while it was read: run the same command again")
    write_unit(unit.parent, unit.name, rows, done)
    return done


def _rows(encoder: Encoder, shard: str, found: Iterable[Sample | Skipped], options: Options) -> UnitRows:
    rows = UnitRows(_none(encoder), _none(encoder), np.empty(0, np.int64), [], [], [], [])
    vectors: list[np.ndarray] = []
    for batch in _batches(found, rows.skipped, shard, options.batch):
        images = encoder.encode_image(torch.stack([s.pixels for s in batch]))
        for sample, vector, reason in zip(batch, images, map(_flaw, images)):
            if reason:
                rows.skipped.append(_skipped(sample, shard, reason))
                continue
            vectors.append(vector)
            rows.meta.append(_meta(sample, shard))
            rows.thumbs.append(sample.thumb)
            if len(rows.originals) < CANARY_ROWS:
                rows.originals.append(sample.data)
    rows.images = np.stack(vectors) if vectors else rows.images
    if options.texts and encoder.has_text:
        rows.texts, rows.text_rows = _texts(encoder, rows.meta)
    return rows


def _none(encoder: Encoder) -> np.ndarray:
    return np.empty((0, encoder.dim), np.float32)


def _batches(
    found: Iterable[Sample | Skipped], skipped: list[dict[str, Any]], shard: str, size: int
) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for item in found:
        if isinstance(item, Skipped):
            skipped.append(_skipped(item, shard, item.reason))
            continue
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _flaw(vector: np.ndarray) -> str:
    """Why a vector cannot be kept; empty for a good one."""
    if not np.isfinite(vector).all():
        return "embedding is not finite"
    return "" if np.linalg.norm(vector) > 0.5 else "embedding has no length"


def _texts(encoder: Encoder, meta: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of all captions and the row of each one's image; unusable ones are left out."""
    owners = np.array([row for row, m in enumerate(meta) for _ in m["captions"]], np.int64)
    if not len(owners):
        return _none(encoder), owners
    vectors = encoder.encode_text([caption for m in meta for caption in m["captions"]])
    good = np.array([not _flaw(vector) for vector in vectors])
    return vectors[good], owners[good]


def _skipped(sample: Sample | Skipped, shard: str, reason: str) -> dict[str, Any]:
    return {"key": sample.key, "shard": shard, "member": sample.member, "reason": reason}


def _meta(sample: Sample, shard: str) -> dict[str, Any]:
    return {
        "key": sample.key,
        "shard": shard,
        "member": sample.member,
        "extension": sample.extension,
        "offset": sample.offset,
        "size": sample.size,
        "captions": sample.captions,
        "label": sample.label,
        "json": sample.json,
    }
