"""Which rank holds the others up, told by what each does before it meets them.

Synchronous training makes all ranks equally slow: whoever is late, the others wait for in the backward. So every rank
measures its own part of a step, before the first collective (wait for data, transfer, forward), and the means of a
window travel in one asynchronous CPU gather that is read a window later. Where the forward itself has collectives
(FSDP2, ZeRO-3, SyncBatchNorm) only the part before them is a rank's own.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pretrain.distributed.groups import cpu_group
from pretrain.distributed.process import Process

NOISE_S = 0.005
"""An excess below this holds nobody up."""


@dataclass(frozen=True)
class StragglerReport:
    """One window's means of all ranks, the same on every rank."""

    own_s: list[float]
    """Seconds a step before the first collective, by rank."""
    data_s: list[float]
    """Seconds of these spent waiting for data."""
    line: str | None
    """The ranks that have been slow for several windows, with their hosts; once, until they recover."""

    @property
    def figures(self) -> dict[str, float]:
        """For the log: seconds of the slowest and of the median rank."""
        return {"own_s/max": max(self.own_s), "own_s/median": statistics.median(self.own_s)}


class Stragglers:
    """Windows of `every` steps; a rank is named after `windows` of them above `factor` times the median.

    Built and fed by all ranks together: it has a CPU group of its own, which the GPU never waits for.
    """

    def __init__(self, process: Process, factor: float, *, every: int = 50, windows: int = 3) -> None:
        self._factor, self._every, self._windows = factor, every, windows
        self._world = process.world
        self._group = cpu_group() if process.world > 1 else None
        self._hosts = self._gather_hosts()
        self._sums, self._steps = [0.0, 0.0], 0
        self._slow = [0] * process.world
        self._sent: tuple[torch.Tensor, dist.Work | None] | None = None
        self._report: StragglerReport | None = None

    def add(self, own_s: float, data_s: float = 0.0) -> None:
        """One step's seconds before the first collective, and those of them that went into waiting for data.

        Every rank calls it at every step: at the end of a window it sends the means, and takes those of the window
        before.
        """
        self._sums = [self._sums[0] + own_s, self._sums[1] + data_s]
        self._steps += 1
        if self._steps == self._every and self._group is not None:
            self._exchange()

    def read(self) -> StragglerReport | None:
        """The newest window's report, once."""
        report, self._report = self._report, None
        return report

    def _exchange(self) -> None:
        if self._sent is not None:
            table, work = self._sent
            if work is not None:
                work.wait()
            own_s, data_s = table.view(self._world, 2).T.tolist()
            self._report = StragglerReport(own_s, data_s, self._judge(own_s, data_s))
        mine = torch.tensor(self._sums, dtype=torch.float64) / self._steps
        table = torch.empty(2 * self._world, dtype=torch.float64)
        self._sent = (table, dist.all_gather_into_tensor(table, mine, group=self._group, async_op=True))
        self._sums, self._steps = [0.0, 0.0], 0

    def _judge(self, own_s: list[float], data_s: list[float]) -> str | None:
        median = statistics.median(own_s)
        over = [own > max(self._factor * median, median + NOISE_S) for own in own_s]
        self._slow = [windows + 1 if slow else 0 for windows, slow in zip(self._slow, over)]
        named = [
            f"rank {rank} on {self._hosts[rank]} takes {own_s[rank] / max(median, 1e-9):.1f}x the median "
            f"({own_s[rank]:.3f} s against {median:.3f} s a step before the first collective, "
            f"{data_s[rank] / own_s[rank]:.0%} of it waiting for data)"
            for rank, windows in enumerate(self._slow)
            if windows == self._windows
        ]
        return "; ".join(named) or None

    def _gather_hosts(self) -> list[str]:
        hosts = [platform.node()] * self._world
        if self._group is not None:
            dist.all_gather_object(hosts, platform.node(), group=self._group)
        return hosts


class OwnClock:
    """Seconds from a batch's arrival to the first collective; on CUDA by events, read when the device has passed them.

    `begin` and `end` are called once a step; what `end` returns is of the newest step that is known.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begun: torch.cuda.Event | _HostEvent = self._event()
        self._pending: deque[tuple[torch.cuda.Event | _HostEvent, torch.cuda.Event | _HostEvent]] = deque()
        self._newest_s = 0.0

    def begin(self) -> None:
        """The batch is here, not yet on the device."""
        self._begun = self._event()

    def end(self) -> float:
        """The first collective comes next; seconds of the newest step whose work is done."""
        self._pending.append((self._begun, self._event()))
        while self._pending and self._pending[0][1].query():
            begun, ended = self._pending.popleft()
            self._newest_s = begun.elapsed_time(ended) / 1000  # type: ignore[arg-type]
        return self._newest_s

    def _event(self) -> torch.cuda.Event | _HostEvent:
        if not self._cuda:
            return _HostEvent()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _HostEvent:
    """What a CUDA event is, on the host's clock."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: _HostEvent) -> float:
        return (later._at - self._at) * 1000
