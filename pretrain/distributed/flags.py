"""Flags that all ranks must agree on, at no cost to the step.

Every rank sends its flags at each step in one small asynchronous CPU reduction and reads the result of the step
before. So a signal that reaches one rank, or all at different moments, takes effect on all at the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet

import torch
import torch.distributed as dist

from pretrain.distributed.groups import cpu_group


class SharedFlags:
    """Named booleans, or-ed over the ranks, one step late."""

    def __init__(self, names: tuple[str, ...], world: int) -> None:
        self.names = names
        self._group = cpu_group() if world > 1 else None
        self._sent: tuple[torch.Tensor, dist.Work | None] | None = None

    def exchange(self, raised: AbstractSet[str | int]) -> set[str]:
        """Send this rank's flags; the flags that any rank had raised at the previous call (at first: none)."""
        agreed = self._receive()
        tensor = torch.tensor([int(name in raised) for name in self.names], dtype=torch.int32)
        work = None
        if self._group is not None:
            work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._sent = (tensor, work)
        return agreed

    def meet(self, beat: Callable[[], None]) -> None:
        """Wait until all ranks are here, however long some of them take; `beat` is called all the while."""
        if self._group is None:
            return
        work = dist.barrier(group=self._group, async_op=True)
        while not work.is_completed():
            beat()
            time.sleep(0.01)
        work.wait()

    def _receive(self) -> set[str]:
        if self._sent is None:
            return set()
        tensor, work = self._sent
        if work is not None:
            work.wait()
        return {name for name, flag in zip(self.names, tensor.tolist()) if flag}
