"""Where checkpoints lie: a folder on a disk, or a prefix of an object store, behind one interface.

A store is one folder; `store / name` is what lies in it, be it a folder or, in a message, a file. All that this package
asks of a place is here, so that a checkpoint is written and read the same way everywhere: files appear whole or not at
all, any range of one can be read, and names can be listed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from pretrain.checkpoint.errors import CheckpointDiskError, CheckpointError
from pretrain.durable import fsync_folder, write_file

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(.*)")  # a Path of a URL has one slash left
_NEARLY = re.compile(r"(s3a?|gs|gcs|az|abfss?|memory|hdfs)(:|//)")


class Store(ABC):
    """One folder. What fails raises OSError, FileNotFoundError for a file that is not there."""

    name: str
    """The last part of its path."""

    @abstractmethod
    def __truediv__(self, name: str) -> Store: ...

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def names(self) -> set[str]:
        """Files and folders in it; nothing where there is no such folder."""

    @abstractmethod
    def folders(self) -> list[str]:
        """The folders in it."""

    @abstractmethod
    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of each of those files that is there."""

    @abstractmethod
    def read(self, name: str, most: int | None = None) -> bytes:
        """A file, or its first `most` bytes."""

    @abstractmethod
    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` from byte `start` on. Raises EOFError where the file ends before."""

    @abstractmethod
    def write(
        self,
        name: str,
        chunks: Iterable[bytes | memoryview],
        *,
        draft: str | None = None,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """A whole file, or none; durable once its folder is settled.

        `draft`: what it is called until it is whole, where files can be renamed (default: `name`.tmp). ready: called as
        late as the place allows, before the rename or before the upload; what it raises keeps the file from appearing.
        A draft that is removed meanwhile never becomes the file. Raises CheckpointDiskError when the place refuses.
        """

    @abstractmethod
    def remove(self, names: Iterable[str]) -> None:
        """Remove files as far as they are there and can be."""

    @abstractmethod
    def remove_all(self) -> None:
        """Remove the folder with all that is in it, as far as that can be."""

    def settle(self) -> None:  # noqa: B027  nothing, where a name is durable as soon as it is seen
        """Make its list of names durable."""

    def drop_if_empty(self) -> None:  # noqa: B027  nothing, where an empty folder is none
        """Remove the folder if nothing is in it."""


Where = Path | str | Store
"""A folder, a URL (`s3://bucket/run`), or either already opened."""


class LocalStore(Store):
    """A folder of a file system that all ranks see."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name

    def __truediv__(self, name: str) -> LocalStore:
        return LocalStore(self.path / name)

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> set[str]:
        with suppress(FileNotFoundError, NotADirectoryError):
            return set(os.listdir(self.path))  # fresher than stat on network file systems
        return set()

    def folders(self) -> list[str]:
        return [name for name in self.names() if (self.path / name).is_dir()]

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        found = {}
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError):
                found[name] = (self.path / name).stat().st_size
        return found

    def read(self, name: str, most: int | None = None) -> bytes:
        with (self.path / name).open("rb") as file:
            return file.read(most)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        fd = os.open(self.path / name, os.O_RDONLY)
        try:
            while out:
                got = os.preadv(fd, [out], start)
                if got == 0:
                    raise EOFError(f"{self / name} ends at byte {start}")
                out, start = out[got:], start + got
        finally:
            os.close(fd)

    def write(
        self,
        name: str,
        chunks: Iterable[bytes | memoryview],
        *,
        draft: str | None = None,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        views = [memoryview(c).cast("B") for c in chunks]
        try:
            self._write(name, views, draft or f"{name}.tmp", ready)
        except OSError as error:
            raise self._refused(name, sum(map(len, views)), error) from error

    def _write(self, name: str, views: list[memoryview], draft: str, ready: Callable[[], None]) -> None:
        for _ in range(3):  # another rank may sweep the still empty folder away before the file is in it
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                return write_file(self.path / name, views, draft=self.path / draft, ready=ready)
            except FileNotFoundError as error:
                if error.filename2 is not None:  # of the rename: a later start of the run has swept the draft away
                    raise
        raise FileNotFoundError(errno.ENOENT, "the folder keeps disappearing", str(self.path))

    def _refused(self, name: str, needed: int, error: OSError) -> CheckpointDiskError:
        free = "unknown"
        with suppress(OSError):
            free = f"{shutil.disk_usage(self.path).free:,}"
        return CheckpointDiskError(
            error.errno or 0,
            f"checkpoint not saved: {error.strerror or error} (the file needs {needed:,} bytes, {free} are free). "
            f"Earlier checkpoints are untouched; make room, or lower keep_last",
            str(self.path / name),
        )

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(OSError):
                (self.path / name).unlink()

    def remove_all(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def settle(self) -> None:
        with suppress(OSError):  # not every file system can
            fsync_folder(self.path)

    def drop_if_empty(self) -> None:
        with suppress(OSError):
            self.path.rmdir()


def absolute(where: str) -> str:
    """The same place by a name that holds in every working folder."""
    return where if _URL.fullmatch(where) or _NEARLY.match(where) else os.path.abspath(where)


def open_store(where: Where) -> Store:
    """The place that a path or a URL names; nothing is asked of it yet.

    A URL is any that fsspec knows, its credentials and endpoint as its package takes them (environment, or fsspec's own
    configuration files); `file://` is a folder like any other.

    Raises:
        CheckpointError: no such kind of URL, or its package is not installed.
    """
    if isinstance(where, Store):
        return where
    url = _URL.fullmatch(str(where))
    if url is None and isinstance(where, str) and _NEARLY.match(where):
        raise CheckpointError(f"{where!r} is neither a folder nor a URL: a URL begins as s3:// does")
    if url is None:
        return LocalStore(Path(where))
    if url[1] in ("file", "local"):
        return LocalStore(Path("/", url[2]))
    from pretrain.checkpoint.objects import open_url  # its libraries are imported only where they are used

    return open_url(url[1], url[2])
