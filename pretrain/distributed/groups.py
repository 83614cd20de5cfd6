"""Which ranks a function talks to: torch's default group, a group of its own, or nobody.

Every function that communicates takes `group`: None means torch's default group when one is initialised and
one process otherwise, a ProcessGroup means that group, LOCAL means never communicate. A sentinel, not a group
of size one, because such a group would have to be made by all ranks together. Starting processes is not done here.
"""

from __future__ import annotations

import datetime
import enum
from typing import Final

import torch.distributed as dist


class Local(enum.Enum):
    """The type of LOCAL: an enum, so that a deep copy of a module that holds it is still LOCAL."""

    LOCAL = "local"


LOCAL: Final = Local.LOCAL

Group = dist.ProcessGroup | Local | None


def resolve(group: Group = None) -> tuple[dist.ProcessGroup | None, int, int]:
    """(process group, rank in it, its size); (None, 0, 1) where nothing is to be communicated.

    Raises ValueError when this process is not a member of `group`.
    """
    if group is LOCAL or (group is None and not (dist.is_available() and dist.is_initialized())):
        return None, 0, 1
    process_group = dist.group.WORLD if group is None else group
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise ValueError(
            f"rank {dist.get_rank()} of the default group is not a member of the given process group: "
            "call this on the group's own ranks only, or pass group=LOCAL"
        )
    return process_group, rank, dist.get_world_size(process_group)


def cpu_group() -> dist.ProcessGroup:
    """Another group of all ranks, on gloo: its collectives never mix with those of the training step, nor need a GPU.

    They wait for a day: who waits too long in a step is told by the step's own collectives, or by the watchdog.
    """
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    assert isinstance(group, dist.ProcessGroup)
    return group
