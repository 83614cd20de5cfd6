"""Files that are whole or not there: write aside, fsync, rename, fsync of the folder.

Rename is atomic on local file systems, NFS and Lustre.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

_CHUNK = 64 << 20  # bytes a write call: Linux takes at most 2 GiB at once


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str, *, ready: Callable[[], None] = lambda: None) -> None:
    """Put `text` at `path` in one step, durably: a reader sees the old file or the new one. ready: see `write_file`."""
    write_file(path, [text.encode()], draft=path.with_name(f".{path.name}.{os.getpid()}.tmp"), ready=ready)
    fsync_folder(path.parent)


def write_file(
    path: Path, chunks: Iterable[bytes | memoryview], *, draft: Path, ready: Callable[[], None] = lambda: None
) -> None:
    """Put `chunks` at `path` in one step; the name is durable once its folder is synced.

    draft: the name until then, in the same folder. ready: called when all is written but for that step; what it raises
    keeps the file from appearing. Raises OSError, and leaves nothing behind, when the disk refuses.
    """
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for chunk in chunks:
                _write_all(fd, memoryview(chunk).cast("B"))
            os.fsync(fd)
        finally:
            os.close(fd)
        ready()
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def _write_all(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view[:_CHUNK]) :]
