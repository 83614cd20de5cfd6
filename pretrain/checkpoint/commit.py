"""What rank 0 does with a step folder: wait for all parts, commit, and clear away what is no longer wanted.

Ranks meet only through files, never through a collective, so that all of this can run in a thread beside the
training. Every file carries the attempt that wrote it; an attempt commits nothing but its own files, so a
rank left over from an earlier start of the run can never complete, or spoil, a later one's checkpoint.

Nor may such a start commit one of its own behind the back of a later one. `may_write` raises where a later start has
taken the run over; it is asked when the manifest lies there as a draft, right before the rename. A later start first
says that it is there and then removes such drafts (`forestall`), before it looks for the newest checkpoint: either the
earlier one was committed by then, and is found, or its rename finds no draft. In an object store a manifest has no
draft: what was asked for just before the later start spoke, and was sent, may still arrive. Should that start not have
found it, it holds the run's own weights of a step that will be saved again; its data may be swept, and then it is
passed over as damaged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from typing import Any

from pretrain.checkpoint.errors import CheckpointError, CheckpointTornError, CheckpointUncertainError
from pretrain.checkpoint.layout import MANIFEST, attempt_of, manifest_draft, part_name, step_dir, step_dirs
from pretrain.checkpoint.manifest import (
    Manifest,
    decode_tensors,
    encode_manifest,
    merge,
    read_manifest,
    unseal,
)
from pretrain.checkpoint.reader import Checkpoint, check_files
from pretrain.checkpoint.store import Store, Where

log = logging.getLogger(__name__)


def commit(
    root: Store,
    step: int,
    attempt: str,
    world: int,
    meta: dict[str, Any],
    timeout_s: float,
    run: str | None = None,
    may_write: Callable[[], None] = lambda: None,
) -> None:
    """Wait for every rank's part of `step`, check them together and write the manifest, unless `may_write` raises.

    Raises CheckpointError when a rank reports that it failed, when parts do not come within `timeout_s`
    seconds (naming the ranks), when the parts are not every tensor exactly once, or when a data file is not
    of its size; CheckpointUncertainError when nobody can tell whether the manifest is there.
    """
    folder = step_dir(root, step)
    parts = [_read_part(folder, attempt, rank) for rank in _arrivals(folder, attempt, world, timeout_s)]
    files = {name: size for part in parts for name, size in part["files"].items()}
    tensors = merge((decode_tensors(part["tensors"]) for part in parts), folder)
    manifest = Manifest(step, attempt, world, files, tensors, meta, run)
    check_files(folder, files)
    replaced = _replaced_files(folder)
    folder.settle()
    _put(folder, manifest, may_write)
    folder.settle()
    folder.remove([part_name(attempt, rank) for rank in range(world)])
    folder.remove(replaced - files.keys())


def _put(folder: Store, manifest: Manifest, may_write: Callable[[], None]) -> None:
    """Write the manifest; where the place reports an error, only what is then read there tells whether it has it."""
    may_write()  # even a draft would bring back a folder that a later start has removed
    try:
        folder.write(MANIFEST, [encode_manifest(manifest)], draft=_draft(manifest.attempt), ready=may_write)
    except OSError as error:
        try:
            if read_manifest(folder).attempt == manifest.attempt:
                return
        except CheckpointTornError:
            pass
        except CheckpointError as unknown:
            raise CheckpointUncertainError(
                f"{folder}: whether its manifest has arrived is not known ({error.strerror}; then {unknown}). Its data "
                f"stay until a later save"
            ) from error
        raise


def _draft(attempt: str) -> str:
    return manifest_draft(attempt) + ".tmp"


def forestall(places: Iterable[Where], attempt: str) -> None:
    """What starts before `attempt` have not committed in `places` by now they never will. Called by rank 0 of the start
    that takes the run over, once it has said so where they look.
    """
    for folder in (folder for place in places for folder in step_dirs(place).values()):
        earlier = {name: whose for name in folder.names() if (whose := attempt_of(name)) not in (None, attempt)}
        folder.remove([name for name, whose in earlier.items() if name == _draft(whose)])


def _arrivals(folder: Store, attempt: str, world: int, timeout_s: float) -> range:
    """All ranks, once the parts of all of them are there."""
    expected = {part_name(attempt, rank): rank for rank in range(world)}
    deadline, pause = time.monotonic() + timeout_s, 0.005
    while True:
        present = folder.names()
        missing = [rank for name, rank in expected.items() if name not in present]
        if not missing:
            return range(world)
        if time.monotonic() > deadline:
            shown = ", ".join(map(str, missing[:20])) + (" …" if len(missing) > 20 else "")
            raise CheckpointError(
                f"{folder}: not committed: after {timeout_s:g} s the parts of {len(missing)} of {world} "
                f"ranks are missing (ranks {shown}; attempt {attempt}). Those ranks died, or do not see this "
                f"folder. Earlier checkpoints are untouched"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def _read_part(folder: Store, attempt: str, rank: int) -> dict[str, Any]:
    name = part_name(attempt, rank)
    part = unseal(folder.read(name), folder / name)
    if "error" in part:
        raise CheckpointError(f"{folder}: not committed: rank {rank} could not write: {part['error']}")
    return part


def _replaced_files(folder: Store) -> set[str]:
    """Files of the checkpoint of this step that an earlier attempt had committed and this one takes the place
    of.
    """
    with suppress(CheckpointError):
        return set(read_manifest(folder).files)
    return set()


def purge(
    root: Store,
    committed: int,
    keep_last: int | None,
    keep_every: int | None,
    run: str | None = None,
    may_write: Callable[[], None] = lambda: None,
) -> None:
    """Remove whole checkpoints of `run` up to step `committed`, but the last `keep_last` and each `keep_every`-th
    step.

    Only whole ones count as kept, so the last whole one is never removed. Damaged ones later than those kept stay for
    a person to look at, and so does what cannot be told to be of `run`. Steps after `committed` are left alone.
    `may_write` is asked before each removal.
    """
    if keep_last is None:
        return
    folders = {step: folder for step, folder in step_dirs(root).items() if step <= committed}
    folders = {step: folder for step, folder in folders.items() if MANIFEST in folder.names()}
    recent = list(islice((step for step, folder in folders.items() if _is_whole(folder, run)), keep_last))
    for step, folder in folders.items():
        if recent and step < recent[-1] and not (keep_every and step % keep_every == 0) and _is_of(run, folder):
            may_write()
            _remove(folder)


def _is_whole(folder: Store, run: str | None) -> bool:
    try:
        checkpoint = Checkpoint(folder)
        checkpoint.check_files()
    except CheckpointError:
        return False
    return checkpoint.run == run


def _is_of(run: str | None, folder: Store) -> bool:
    with suppress(CheckpointError):
        return read_manifest(folder).run == run
    return False


def _remove(folder: Store) -> None:
    """The manifest first: a half-removed checkpoint must not be taken for a whole one."""
    folder.remove([MANIFEST])
    folder.settle()
    folder.remove_all()
    if folder.names():
        log.warning("%s: could not be removed entirely; it is no longer a checkpoint and may be deleted", folder)


def sweep_others(root: Store, attempt: str) -> None:
    """At a start: remove what earlier attempts left without committing it."""
    for folder in step_dirs(root).values():
        try:
            wanted = set(read_manifest(folder).files)
        except CheckpointTornError:
            wanted = set()
        except CheckpointError:
            continue  # damaged, not torn: for a person to look at
        names = folder.names() - wanted
        folder.remove([name for name in names if attempt_of(name) not in (None, attempt)])
        folder.drop_if_empty()


def sweep_own(root: Store, attempt: str, committed: int) -> None:
    """After a commit: remove what this attempt left of earlier saves that failed."""
    for step, folder in step_dirs(root).items():
        if step < committed and MANIFEST not in (names := folder.names()):
            folder.remove([name for name in names if attempt_of(name) == attempt])
            folder.drop_if_empty()
