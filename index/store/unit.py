"""What embedding one tar gives: a folder that is complete when it exists.

`units/<name>/`: images.npy (N, D) float16, texts.npy (M, D) float16 and text_rows.npy (M,) with the image row
of each caption, meta.parquet, skipped.parquet, thumbs.*, canaries.parquet and, written last, DONE.json. The
folder is made under a temporary name and renamed. Its name is a hash of the tar's identity and the encoder's
fingerprint, so a changed tar or another encoder never finds an old unit.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from index.errors import DamagedCollection
from index.store.durable import commit_folder, new_folder
from index.store.tables import CANARIES, META, SKIPPED, write_table
from index.store.thumbs import write_thumbs

CANARY_ROWS = 32  # originals kept a segment, and so at most a unit


@dataclass
class UnitRows:
    """The rows of one tar while they are made."""

    images: np.ndarray  # (N, D) float32 unit rows
    texts: np.ndarray  # (M, D)
    text_rows: np.ndarray  # (M,) int64
    meta: list[dict[str, Any]]
    thumbs: list[bytes]
    skipped: list[dict[str, Any]]
    originals: list[bytes]  # of the first rows, at most 32


@dataclass(frozen=True)
class Done:
    """DONE.json: what a finished unit says of itself."""

    source: str  # identity of the tar
    shard: str  # where the tar was
    fingerprint: str
    dim: int
    members: int
    rows: int
    texts: int
    skipped: dict[str, int]  # reason -> samples
    encoder: dict[str, Any] = field(default_factory=dict)  # provenance: checkpoint, image size, text tower


def tar_identity(tar: Path) -> str:
    """Name, size and time of change of a tar, hashed: the same after the folder moved, another after a
    rewrite.
    """
    stat = tar.stat()
    return hashlib.sha256(f"{tar.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:32]


def unit_name(identity: str, fingerprint: str, texts: bool) -> str:
    return hashlib.sha256(f"{identity}\0{fingerprint}\0{texts}".encode()).hexdigest()[:24]


def write_unit(units: Path, name: str, rows: UnitRows, done: Done) -> None:
    """Write a unit; without effect when another process has finished the same one meanwhile."""
    if done.rows + sum(done.skipped.values()) != done.members:
        raise ValueError(f"{done.shard}: {done.rows} rows and {done.skipped} skipped of {done.members} samples")
    with new_folder(units) as folder:
        np.save(folder / "images.npy", rows.images.astype(np.float16))
        np.save(folder / "texts.npy", rows.texts.astype(np.float16))
        np.save(folder / "text_rows.npy", rows.text_rows.astype(np.int64))
        write_table(folder / "meta.parquet", rows.meta, META)
        write_table(folder / "skipped.parquet", rows.skipped, SKIPPED)
        originals = [{"row": i, "image": data} for i, data in enumerate(rows.originals)]
        write_table(folder / "canaries.parquet", originals, CANARIES)
        write_thumbs(folder, rows.thumbs)
        (folder / "DONE.json").write_text(json.dumps(asdict(done), indent=1, sort_keys=True) + "\n")
        commit_folder(folder, units / name)


def read_done(unit: Path) -> Done | None:
    """What a unit holds, or None when there is no finished unit."""
    try:
        return Done(**json.loads((unit / "DONE.json").read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DamagedCollection(f"{unit}/DONE.json is damaged ({error}): remove {unit} and embed again") from error


def finished_units(embeddings: Path) -> dict[str, Done]:
    """Every finished unit of an embedding folder, by name."""
    units = embeddings / "units"
    names = sorted(p.name for p in units.iterdir() if not p.name.startswith(".")) if units.is_dir() else []
    found = {name: read_done(units / name) for name in names}
    return {name: done for name, done in found.items() if done is not None}
