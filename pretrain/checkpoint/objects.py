"""Checkpoints in an object store (S3, GCS, Azure, whatever fsspec opens).

An object appears whole or not at all, and is seen by everybody at once, so there is nothing to rename or to sync: every
file is put under its final name, the manifest last. An upload that was cut short by a kill leaves parts that only the
bucket's own rule for incomplete multipart uploads clears away.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from pretrain.checkpoint.errors import CheckpointDiskError, CheckpointError
from pretrain.checkpoint.store import Store

_PART = 64 << 20  # bytes of one part of an upload: 10,000 parts at most are allowed, a data file has 4 GiB
_SLICE = 8 << 20  # bytes handed over at once: the copy holds the interpreter for a millisecond or two
_RANGE = 16 << 20  # bytes a request for a part of an object
_AT_ONCE = 8  # such requests under way together
_ADVICE = {
    errno.ENOENT: "make the bucket, or correct the URL",
    errno.EACCES: "check the credentials and what they may do there",
}


def open_url(protocol: str, path: str) -> ObjectStore:
    """The prefix that `protocol`://`path` names; CheckpointError where fsspec cannot open such."""
    url = f"{protocol}://{path}".rstrip("/")
    if not path.strip("/"):
        raise CheckpointError(f"{protocol}:// names no bucket; give {protocol}://bucket/folder")
    try:
        fs, root = url_to_fs(url, use_listings_cache=False)  # other ranks write meanwhile
    except ImportError as error:
        package = known_implementations[protocol]["class"].split(".")[0]
        install = "" if package == "fsspec" else f": `pip install '{package}'`"
        raise CheckpointError(f"{url}: {error}{install}") from error
    except Exception as error:  # a protocol nobody knows, or options of the environment that its client refuses
        raise CheckpointError(f"{url}: cannot be opened: {error}; a URL is such as s3://bucket/folder") from error
    return ObjectStore(fs, root, url)


class ObjectStore(Store):
    """All objects whose keys begin with `path` and a slash."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, url: str) -> None:
        self._fs, self._path, self._url = fs, path.rstrip("/"), url
        self.name = url.rsplit("/", 1)[-1]

    def __truediv__(self, name: str) -> ObjectStore:
        return ObjectStore(self._fs, self._key(name), f"{self._url}/{name}")

    def __str__(self) -> str:
        return self._url

    def names(self) -> set[str]:
        return set(self._listed())

    def folders(self) -> list[str]:
        return [name for name, entry in self._listed().items() if entry["type"] == "directory"]

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        listed = self._listed()
        return {name: listed[name]["size"] for name in names if name in listed}

    def read(self, name: str, most: int | None = None) -> bytes:
        bounds = {} if most is None else {"start": 0, "end": most}
        with _as_os_errors():
            return self._fs.cat_file(self._key(name), **bounds)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        key, ranges = self._key(name), [(lo, min(lo + _RANGE, len(out))) for lo in range(0, len(out), _RANGE)]
        for i in range(0, len(ranges), _AT_ONCE):
            some = ranges[i : i + _AT_ONCE]
            begins, ends = [start + lo for lo, _ in some], [start + hi for _, hi in some]
            with _as_os_errors():
                found = self._fs.cat_ranges([key] * len(some), begins, ends, on_error="raise")
            for (lo, hi), data in zip(some, found):
                if len(data) != hi - lo:
                    raise EOFError(f"{self / name} ends at byte {start + lo + len(data)}")
                out[lo:hi] = data

    def write(
        self,
        name: str,
        chunks: Iterable[bytes | memoryview],
        *,
        draft: str | None = None,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        views = [memoryview(c).cast("B") for c in chunks]
        ready()
        try:
            with _as_os_errors():
                if sum(map(len, views)) <= _SLICE:
                    self._fs.pipe_file(self._key(name), b"".join(views))
                else:
                    self._upload(name, views)
        except OSError as e:
            advice = _ADVICE.get(e.errno or 0, "is the store reachable, and has it room?")
            raise CheckpointDiskError(
                e.errno or errno.EIO,
                f"checkpoint not saved: {e.strerror}. Earlier checkpoints are untouched; {advice}",
                str(self / name),
            ) from e

    def remove(self, names: Iterable[str]) -> None:
        wanted = set(names)
        with suppress(OSError), _as_os_errors():
            for name in self.names() & wanted:
                self._fs.rm_file(self._key(name))  # not `rm`, which takes a name for a pattern

    def remove_all(self) -> None:
        self.remove(self.names())

    def _key(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _listed(self) -> dict[str, dict[str, Any]]:
        """What fsspec says of each name; nothing for a prefix that no key has, or a bucket that is not there."""
        with suppress(FileNotFoundError), _as_os_errors():
            entries = self._fs.ls(self._path, detail=True)
            split = [(e["name"].rstrip("/").rpartition("/"), e) for e in entries]
            return {name: entry for (folder, _, name), entry in split if folder == self._path}
        return {}

    def _upload(self, name: str, views: list[memoryview]) -> None:
        """In parts; nothing of it is seen before the last one has arrived."""
        file = self._fs.open(self._key(name), "wb", block_size=_PART, autocommit=False)
        try:
            for piece in chain.from_iterable(_slices(view) for view in views):
                file.write(piece)
            file.close()
            file.commit()
        except BaseException:
            with suppress(Exception):
                file.closed = True  # or its destructor would send the rest
            with suppress(Exception):
                file.discard()
            raise


def _slices(view: memoryview) -> Iterator[memoryview]:
    return (view[lo : lo + _SLICE] for lo in range(0, len(view), _SLICE))


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Whatever a store's client raises, as an OSError that says it: each client has exceptions of its own."""
    try:
        yield
    except Exception as error:
        kinds = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}
        code = next((code for kind, code in kinds.items() if isinstance(error, kind)), errno.EIO)
        raise OSError(code, str(error) if code != errno.EIO else f"{type(error).__name__}: {error}") from error
