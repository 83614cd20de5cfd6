"""Tars made elsewhere, taken as they are: an index beside each, and a `pack.json` so that they open at once.

Nothing is copied. `pack.json` goes into the tars' folder, or into another one (for tars on a read-only disk),
where it names them by relative path and stands for them: that folder is then what a recipe names.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

from pretrain.errors import UserError
from pretrain.shards.index import ShardIndex, load_index
from pretrain.shards.pack import write_summary


def index_all(shards: Sequence[Path], workers: int | None = None) -> Iterator[ShardIndex]:
    """`load_index` of every shard, in order; in processes when there are many, since walking headers is
    Python."""
    workers = min(workers or os.cpu_count() or 1, len(shards))
    pool: Executor
    if workers < 2 or len(shards) < 16:
        pool = ThreadPoolExecutor(max(workers, 1))
    else:
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    with pool:
        yield from pool.map(load_index, shards)


def adopt(indexes: Sequence[ShardIndex], out: Path | None) -> Path:
    """Write `pack.json` for indexed tars; the folder it is in. UserError when that cannot be written to."""
    folders = {index.path.parent for index in indexes}
    if out is None and len(folders) > 1:
        raise UserError(f"the tars lie in {len(folders)} folders: say with --out where their pack.json goes")
    folder = out or folders.pop()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        named = [(os.path.relpath(index.path, folder), index) for index in indexes]
        write_summary(folder, named, {"format": "webdataset"})
    except OSError as error:
        raise UserError(
            f"{folder}: pack.json cannot be written ({error.strerror}): name a folder with --out"
        ) from error
    return folder
