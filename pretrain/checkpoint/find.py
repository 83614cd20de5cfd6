"""Which checkpoint is meant: one step's folder, the newest of a run's, wherever the run keeps them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

from pretrain.checkpoint.claim import owners
from pretrain.checkpoint.errors import CheckpointError, CheckpointUnreadableError, unreadable
from pretrain.checkpoint.layout import MANIFEST, step_dirs
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.store import Store, Where, open_store
from pretrain.patience import patiently

log = logging.getLogger(__name__)

_ID = "run_id"
_STARTS = "run.json"  # of a run folder: where else each start of it has saved


def open_checkpoint(where: Where) -> Checkpoint:
    """The checkpoint in one step folder. Raises CheckpointError if it is not whole."""
    checkpoint = Checkpoint(open_store(where))
    checkpoint.check_files()
    return checkpoint


def find_checkpoint(where: Where) -> Checkpoint:
    """The newest whole checkpoint of a run folder or a checkpoints folder, or the one in one step's folder.

    `where` may be a URL. A run folder is followed to wherever its starts have sent their checkpoints. Raises
    CheckpointError when there is none.
    """
    store = open_store(where)
    try:
        names = patiently(store.names)
    except OSError as e:
        raise unreadable(f"{store}: the list of what it holds", e) from e
    if not names:
        raise CheckpointError(
            f"{store}: no such folder, or nothing in it; give a run folder, its checkpoints folder, or one step's"
        )
    if MANIFEST in names or store.name.startswith("step_"):
        return open_checkpoint(store)
    found = [checkpoint for place in _places(store, names) if (checkpoint := find_latest(place)) is not None]
    if found:
        return max(found, key=lambda checkpoint: checkpoint.step)
    raise CheckpointError(
        f"{store} holds no whole checkpoint; give a run folder, its checkpoints folder, or one step's"
    )


def _places(store: Store, names: set[str]) -> Iterator[Where]:
    """Where a folder's checkpoints may be, but for what is another run's by now."""
    yield store / "checkpoints" if "checkpoints" in names else store
    if _STARTS in names:
        run = store.read(_ID).decode().strip() if _ID in names else None
        yield from (to for to in _sent_to(store) if _is_of(to, run))


def _is_of(place: Where, run: str | None) -> bool:
    try:
        return owners(place) <= {run}
    except CheckpointError as error:  # a bucket that was retired must not stop the use of what is here
        log.warning("not looked for checkpoints: %s", error)
        return False


def _sent_to(run: Store) -> list[str]:
    try:
        starts: Any = json.loads(run.read(_STARTS))
        return list(dict.fromkeys(start["to"] for start in starts if "to" in start))
    except (OSError, ValueError, TypeError):
        return []  # no run of ours: the folder may hold checkpoints all the same


def find_latest(root: Where, *, verify: bool = False, at_most: int | None = None) -> Checkpoint | None:
    """The whole checkpoint of the highest step under `root` (not above `at_most`), None when there is none.

    Torn and damaged ones are passed over with a warning: no manifest, an unreadable one, files missing or of
    the wrong size; with `verify` also bytes that do not match their checksums (reads everything). One that cannot
    be read now may be whole: CheckpointUnreadableError.
    """
    for step, folder in step_dirs(root).items():
        if at_most is not None and step > at_most:
            continue
        try:
            checkpoint = open_checkpoint(folder)
            if verify:
                checkpoint.verify()
            return checkpoint
        except CheckpointUnreadableError:
            raise  # it may well be whole
        except CheckpointError as e:
            log.warning("checkpoint passed over: %s", e)
    return None
