"""Files that are either whole, on the disk and under their name, or not there: write aside, fsync, rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pretrain.checkpoint.errors import CheckpointDiskError

_CHUNK = 64 << 20  # bytes a write call: Linux takes at most 2 GiB at once


def write_durably(path: Path, chunks: Iterable[bytes | memoryview], *, draft: Path | None = None) -> None:
    """Write `chunks` to `path` so that the name appears only with the whole content on the disk.

    `draft` is the name used until then (default: `path` + ".tmp"). Raises CheckpointDiskError, and leaves
    nothing behind, when the disk refuses.
    """
    views = [memoryview(c).cast("B") for c in chunks]
    draft = draft or path.with_name(path.name + ".tmp")
    try:
        fd = _create(draft)
        try:
            for view in views:
                for start in range(0, len(view), _CHUNK):
                    _write_all(fd, view[start : start + _CHUNK])
            os.fsync(fd)
        finally:
            os.close(fd)
        draft.rename(path)
    except OSError as e:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise _refused(path, sum(len(v) for v in views), e) from e


def sync_folder(folder: Path) -> None:
    """Make the folder's list of names durable; file systems that cannot are left alone."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _create(path: Path) -> int:
    for _ in range(3):  # another rank may sweep the still empty folder away between the two calls
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    raise FileNotFoundError(2, "the folder keeps disappearing", str(path.parent))


def _write_all(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]


def _refused(path: Path, needed: int, error: OSError) -> CheckpointDiskError:
    free = "unknown"
    with suppress(OSError):
        free = f"{shutil.disk_usage(path.parent).free:,}"
    return CheckpointDiskError(
        error.errno or 0,
        f"checkpoint not saved: {error.strerror or error} (the file needs {needed:,} bytes, {free} are "
        f"free). "
        f"Earlier checkpoints are untouched; make room, or lower keep_last",
        str(path),
    )
