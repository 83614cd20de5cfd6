"""The checkpoint that all ranks of a run go on from: the newest whole one, looked at by all of them together.

Each rank reads a share of the bytes, so that a check of all of them costs a part of the load that follows; one rank's
doubt is everybody's, so that all load the same or none.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch.distributed as dist

from pretrain.checkpoint.errors import CheckpointError, CheckpointTornError, CheckpointUnreadableError
from pretrain.checkpoint.layout import step_dirs
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.store import Where, open_store
from pretrain.distributed.groups import Group, resolve

log = logging.getLogger(__name__)


class _Seen(NamedTuple):
    """What one rank makes of a step folder."""

    attempt: str | None
    fault: str | None
    torn: bool = False
    """Its save never ended: nothing that was ever whole has been lost."""
    unreadable: bool = False
    """It may be whole: the place does not answer this rank."""


def newest_whole(root: Where, *others: Where, group: Group = None) -> Checkpoint | None:
    """The newest whole checkpoint under `root` or `others`, the same on all ranks; None: nothing was saved yet.

    Called by all ranks together. Every byte is compared with its checksum, by one rank or another. Those that are torn
    or damaged are passed over with a warning that names file and reason. `others` are places that the run has saved to
    before.

    Raises:
        CheckpointUnreadableError: a place cannot be listed, or one of its files cannot be read: what it holds may be
            whole, and going on from an older one would lose work.
        CheckpointError: checkpoints were saved and not one of them is whole: beginning anew beside them, and in the end
            over them, is for a person to decide.
    """
    _, rank, world = resolve(group)
    listed = _gather(_list(root, *others) if rank == 0 else None, group)[0]
    if isinstance(listed, CheckpointError):
        raise listed
    damaged = []
    for folder in listed:
        checkpoint, mine = _look(folder, rank, world)
        seen = _gather(mine, group)
        fault = _fault(seen)
        if fault is None:
            return checkpoint
        if away := {rank: s.fault for rank, s in enumerate(seen) if s.unreadable}:
            raise CheckpointUnreadableError(f"{next(iter(away.values()))} (seen by ranks {', '.join(map(str, away))})")
        if rank == 0:
            log.warning("checkpoint passed over: %s", fault)
        if not all(s.torn for s in seen):
            damaged.append(fault)
    if damaged:
        raise CheckpointError(
            f"{root}: no checkpoint in it is whole, and the run does not begin anew beside what was saved:\n  "
            + "\n  ".join(damaged)
            + "\nput the files back; or, to begin anew, move that folder away or give another output"
        )
    return None


def _list(*roots: Where) -> list[str] | CheckpointError:
    """Step folders of all `roots`, newest first; or what is wrong."""
    try:
        found = [which for root in dict.fromkeys(map(str, roots)) for which in step_dirs(root).items()]
    except CheckpointError as error:
        return error
    return [str(folder) for _, folder in sorted(found, key=lambda f: f[0], reverse=True)]


def _look(folder: str, rank: int, world: int) -> tuple[Checkpoint | None, _Seen]:
    try:
        checkpoint = Checkpoint(open_store(folder))
        checkpoint.verify(rank, world)
        return checkpoint, _Seen(checkpoint.attempt, None)
    except CheckpointTornError as error:
        return None, _Seen(None, str(error), torn=True)
    except CheckpointUnreadableError as error:
        return None, _Seen(None, str(error), unreadable=True)
    except CheckpointError as error:
        return None, _Seen(None, str(error))
    except Exception as error:  # whatever it is, the others wait to hear of it
        # the bytes are not to blame for a machine's failure
        return None, _Seen(None, f"{folder}: {error!r}", unreadable=isinstance(error, (OSError, MemoryError)))


def _fault(seen: list[_Seen]) -> str | None:
    """The first fault that a rank found."""
    for rank, s in enumerate(seen):
        if s.fault is not None:
            return s.fault if all(other.fault for other in seen) else f"{s.fault} (seen by rank {rank})"
    attempts = {s.attempt for s in seen}
    return None if len(attempts) == 1 else f"the ranks see saves of different starts of the run ({attempts})"


def _gather(mine: Any, group: Group) -> list[Any]:
    """What every rank has, on all ranks."""
    process_group, _, world = resolve(group)
    if process_group is None:
        return [mine]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, mine, group=process_group)
    return found
