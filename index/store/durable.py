"""Files that survive a crash whole or not at all: temporary name, fsync, rename, fsync of the folder.

Rename is atomic on local file systems, NFS and Lustre; nothing here ever changes a file in place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.durable import fsync_folder, write_text
from pretrain.errors import UserError

LEFT_SECONDS = 86400


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


@contextlib.contextmanager
def new_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder beside its later place; removed on leaving unless `commit_folder` renamed it.

    Folders that killed processes left a day ago are swept away.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(".tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    folder = parent / f".tmp-{os.getpid()}-{os.urandom(4).hex()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def commit_folder(folder: Path, final: Path) -> bool:
    """Make a finished folder durable and give it its name; False when that name is already taken (ours is
    dropped).
    """
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    fsync_folder(folder)
    try:
        os.rename(folder, final)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    fsync_folder(final.parent)
    return True


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(folder: Path) -> list[dict[str, Any]]:
    """Name, bytes and sha256 of each file of a folder, sorted by name."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    return [{"path": p.name, "bytes": p.stat().st_size, "sha256": sha256(p)} for p in files]


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One writer at a time in a collection; released when the process ends, however it ends."""
    fd = os.open(folder / "LOCK", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(f"{folder}: cannot be locked for writing ({error.strerror})") from error
        yield
    finally:
        os.close(fd)
