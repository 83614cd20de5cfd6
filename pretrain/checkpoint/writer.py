"""Saving while training goes on: copy to the host, then a thread writes, and rank 0's thread commits.

The thread takes no collective and holds no lock of the trainer. One save is written at a time: a second one
waits for the first (the host buffers are reused), and errors of the thread are raised at the next call on the
same rank. Not here: what to save (the backends' fragments) and when (the trainer).
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor

from pretrain.checkpoint.commit import commit, purge, sweep_others, sweep_own
from pretrain.checkpoint.errors import CheckpointError, CheckpointUncertainError
from pretrain.checkpoint.fragments import Fragment
from pretrain.checkpoint.layout import (
    DTYPE_NAMES,
    check_attempt,
    data_name,
    encode_header,
    part_name,
    step_dir,
)
from pretrain.checkpoint.manifest import Entry, Range, encode_tensors, seal
from pretrain.checkpoint.staging import FILE_LIMIT, HostBuffers, Piece, plan_files
from pretrain.checkpoint.store import Store, Where, open_store

log = logging.getLogger(__name__)


def new_attempt() -> str:
    """A token for one start of a run; rank 0 makes it and sends it to the other ranks."""
    return secrets.token_hex(6)


class CheckpointWriter:
    """Writes `root`/step_<step>/ together with the writers of the other ranks.

    root: the run's `checkpoints` folder, seen by all ranks, or a URL; whether this rank may write there is tried at
    once, not after hours of training: CheckpointDiskError where it may not. attempt: a token unique to this start of
    the run, the same on all ranks. run: the run's id, noted in every manifest: only checkpoints with the same one are
    ever removed. keep_last: whole checkpoints kept (None: all); keep_every: steps divisible by it are kept besides.
    timeout_s: how long rank 0's thread waits for the other ranks' parts. file_limit: bytes of data a file, a multiple
    of 8. may_write: raises where a later start has taken the run over; asked on every rank when a save begins and at
    each of its files, on rank 0 at the manifest and before anything is removed.
    """

    def __init__(
        self,
        root: Where,
        *,
        rank: int = 0,
        world: int = 1,
        attempt: str,
        run: str | None = None,
        keep_last: int | None = 3,
        keep_every: int | None = None,
        timeout_s: float = 1800.0,
        file_limit: int = FILE_LIMIT,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        if keep_last is not None and keep_last < 1:
            raise CheckpointError(f"keep_last={keep_last}: keep at least 1 checkpoint, or null to keep all")
        if not 0 <= rank < world:
            raise CheckpointError(f"rank {rank} is not one of a world of {world}")
        self.root, self.rank, self.world = open_store(root), rank, world
        self.attempt, self.run = check_attempt(attempt), run
        self.committed: int | None = None  # rank 0: the last step this writer committed
        self._may_write = may_write
        self._keep, self._timeout_s, self._file_limit = (keep_last, keep_every), timeout_s, file_limit
        self._buffers = HostBuffers()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._last_step = -1
        trial = f"trial-{self.attempt}-{rank:05d}"
        self._put(self.root, trial, [b"may this rank write here?"])
        self.root.remove([trial])
        if rank == 0:
            with _untidy():
                sweep_others(self.root, self.attempt)

    def reserve(self, fragments: Sequence[Fragment]) -> None:
        """Make host memory ready in the background, so that the first save is as short as later ones.

        Only sizes and devices are used. Optional; call it before the first step.
        """
        files = plan_files(fragments, self._file_limit)
        self.wait()
        self._start(lambda: self._buffers.reserve(files), "reserve")

    def save(self, step: int, fragments: Sequence[Fragment], meta: dict[str, Any]) -> None:
        """Copy `fragments` to the host and return; a thread writes them, and rank 0's commits with `meta`
        (JSON).

        Waits for the save before it, and raises that one's error instead of saving. A step just saved is not
        saved again. Raises CheckpointError for fragments or steps that cannot be saved, ValueError or
        TypeError for a `meta` that is not JSON (NaN included), and what `may_write` raises.
        """
        self.wait()
        if step == self._last_step:
            return
        self._may_write()
        if step < self._last_step:
            raise CheckpointError(
                f"step {step} comes after step {self._last_step} was saved: to go back in a run, make a new "
                f"CheckpointWriter with a new attempt"
            )
        seal(meta)  # complain now, in the caller's line, not later in the thread
        files = plan_files(fragments, self._file_limit)
        filled = self._buffers.fill(files)
        self._last_step = step
        self._start(lambda: self._write(step, files, filled, meta), f"step-{step}")

    def wait(self, beat: Callable[[], None] = lambda: None) -> None:
        """Until the save going on has been written (rank 0: committed). Raises the error it met, once.

        beat: called every second meanwhile, for `timeout_s` at most: what takes longer has come to a standstill.
        """
        if self._thread is not None:
            deadline = time.monotonic() + self._timeout_s
            while self._thread.is_alive() and time.monotonic() < deadline:
                beat()
                self._thread.join(1.0)
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self, timeout_s: float = 30.0) -> None:
        """Give the save going on up to `timeout_s` seconds to become whole; raises nothing.

        For a process that ends, of an error too: its threads end with it, and the save with them. The time is
        short because a commit never comes where another rank has died.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _start(self, work: Any, name: str) -> None:
        # a daemon: a process that dies of another error must not stay for a commit that cannot come
        self._thread = threading.Thread(target=self._guard, args=(work,), name=f"checkpoint-{name}", daemon=True)
        self._thread.start()

    def _guard(self, work: Any) -> None:
        try:
            work()
        except Exception as e:
            self._error = e

    def _write(self, step: int, files: list[list[Piece]], filled: list[Tensor], meta: dict[str, Any]) -> None:
        try:
            self._write_part(step, files, filled)
            if self.rank == 0:
                commit(self.root, step, self.attempt, self.world, meta, self._timeout_s, self.run, self._may_write)
        except Exception as e:
            self._last_step = -1 if self.committed is None else self.committed
            if not isinstance(e, CheckpointUncertainError):
                self._give_up(step, len(files), e)
            if isinstance(e, OSError) and not isinstance(e, CheckpointError):
                raise CheckpointError(f"{step_dir(self.root, step)}: not saved: {e.strerror or e}") from e
            raise
        if self.rank == 0:
            self.committed = step
            self._may_write()
            with _untidy():
                sweep_own(self.root, self.attempt, step)
                purge(self.root, step, *self._keep, self.run, self._may_write)

    def _write_part(self, step: int, files: list[list[Piece]], filled: list[Tensor]) -> None:
        """This rank's data files, then the part that lists them."""
        folder = step_dir(self.root, step)
        labels = {"step": str(step), "attempt": self.attempt, "rank": str(self.rank)}
        sizes: dict[str, int] = {}
        found: dict[str, list[Range]] = {}
        kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        for i, (pieces, buffer) in enumerate(zip(files, filled, strict=True)):
            name, data = data_name(self.attempt, self.rank, i), buffer.numpy().data
            header = encode_header({p.key: _header_entry(p) for p in pieces}, labels)
            for p in pieces:
                f, crc = p.fragment, zlib.crc32(data[p.start : p.stop])
                kinds[f.name] = (DTYPE_NAMES[f.dtype], tuple(f.shape))
                found.setdefault(f.name, []).append(Range(p.offset, p.hi - p.lo, name, crc))
            self._put(folder, name, [header, data])
            sizes[name] = len(header) + len(data)
        tensors = {name: Entry(*kinds[name], tuple(ranges)) for name, ranges in found.items()}
        folder.settle()
        part = seal({"rank": self.rank, "files": sizes, "tensors": encode_tensors(tensors)})
        self._put(folder, part_name(self.attempt, self.rank), [part])

    def _put(self, folder: Store, name: str, chunks: list[Any]) -> None:
        """A file of this start's; asked before too, since even a draft would lie in another's way."""
        self._may_write()
        folder.write(name, chunks, ready=self._may_write)

    def _give_up(self, step: int, files: int, error: Exception) -> None:
        """Free the room this rank's torn files take, and tell rank 0, if the place allows, not to wait."""
        folder, part = step_dir(self.root, step), part_name(self.attempt, self.rank)
        folder.remove([part, *(data_name(self.attempt, self.rank, i) for i in range(files))])
        folder.drop_if_empty()
        if self.rank != 0:
            with suppress(OSError):
                self._put(folder, part, [seal({"error": str(error)})])


@contextmanager
def _untidy() -> Iterator[None]:
    """What cannot be cleared away costs room, and no checkpoint."""
    try:
        yield
    except (OSError, CheckpointError) as error:
        log.warning("files of earlier saves were left where they are: %s", error)


def _header_entry(p: Piece) -> tuple[str, int, int, int]:
    return DTYPE_NAMES[p.fragment.dtype], p.hi - p.lo, p.start, p.stop
