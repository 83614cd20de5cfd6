"""A rank's signs of life: RUN/heartbeat/rank_00003.json says where it is, and a watchdog ends it when it stands still.

What a thread of each rank writes every few seconds, whoever looks from outside reads: {"rank", "host", "pid",
"local_rank", "device", "step", "phase", "since" (seconds since the loop was last heard of), "time" (of writing),
"every_s" (seconds between signs)}. The last phase is "end".
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.distributed.process import STARTING, Process
from pretrain.errors import UserError
from pretrain.telemetry.alive import FOLDER, SILENT, heartbeats
from pretrain.telemetry.watchdog import STDERR, Watchdog

log = logging.getLogger(__name__)


class _Place(NamedTuple):
    step: int
    phase: str
    at: float


class Heartbeat:
    """This rank's signs of life in RUN/heartbeat, until it is closed.

    folder: the run's. every_s: seconds between signs. hang_s: seconds without a call of `at` after which the rank
    writes the stacks of all threads beside its sign of life and to stderr, and ends with exit code HUNG, `STARTING`
    times as many until the first step of this start is done; None: never. may_write: raises where a later start has
    taken the run over, asked at each sign: then the rank says so and ends at once, wherever it stands.

    Crashes in C (a segmentation fault) show the stacks on stderr from here on too.
    """

    def __init__(
        self,
        folder: Path,
        *,
        process: Process,
        every_s: float,
        hang_s: float | None,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        faulthandler.enable(STDERR)
        self._folder, self._process, self._every_s = folder / FOLDER, process, every_s
        self._name = f"rank_{process.rank:05d}"
        self._may_write = may_write
        self._place = _Place(0, "start", time.monotonic())
        self._first_step: int | None = None
        self._told = False
        self._closed = threading.Event()
        self._clear()
        self._write()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        self._watchdog = hang_s and Watchdog(
            lambda: self._place, lambda: self._limit_s(hang_s), self._line, self._file(".stacks")
        )

    def at(self, step: int, phase: str) -> None:
        """The loop is at `phase` of `step`; called again within a long phase, it says that this goes on."""
        if self._first_step is None and phase != "start":
            self._first_step = step
        self._place = _Place(step, phase, time.monotonic())

    def close(self) -> None:
        """The last sign of life, at phase "end"; the watchdog rests."""
        if self._watchdog:
            self._watchdog.close()
        self._place = _Place(self._place.step, "end", time.monotonic())
        self._closed.set()
        self._thread.join(self._every_s)

    def _limit_s(self, hang_s: float) -> float:
        starting = self._first_step is None or self._place.step <= self._first_step
        return hang_s * STARTING if starting else hang_s

    def _line(self, stood_s: float) -> str:
        self._leave_if_superseded()  # the file of stacks is the later start's
        place, where = self._place, self._process
        others = _elsewhere(heartbeats(self._folder.parent), where, place, self._every_s)
        return (
            f"rank {where.rank} on {platform.node()} made no progress for {stood_s:.0f} s (step {place.step}, "
            f"{place.phase}). {others}It ends with its stacks in {self._file('.stacks')}; the same command resumes"
        )

    def _beat(self) -> None:
        closed = False
        while not closed:
            closed = self._closed.wait(self._every_s)
            self._write()

    def _leave_if_superseded(self) -> None:
        try:
            self._may_write()
        except UserError as error:
            print(f"rank {self._process.rank}: {error}", file=sys.stderr, flush=True)
            os._exit(error.exit_code)  # the loop may never come back from where it is, and what it closes it writes

    def _write(self) -> None:
        self._leave_if_superseded()
        place, file = self._place, self._file(".json")
        sign = {
            "rank": self._process.rank,
            "host": platform.node(),
            "pid": os.getpid(),
            "local_rank": self._process.local_rank,
            "device": str(self._process.device),
            "step": place.step,
            "phase": place.phase,
            "since": round(time.monotonic() - place.at, 3),
            "time": time.time(),
            "every_s": self._every_s,
        }
        draft = file.with_name(f".{file.name}.tmp")
        try:
            draft.write_text(json.dumps(sign) + "\n")
            draft.replace(file)  # no fsync: the next one comes in seconds
        except OSError as error:  # a full disk must not end the training
            if not self._told:
                log.warning("%s: no signs of life (%s)", file, error.strerror)
                self._told = True

    def _clear(self) -> None:
        """Make the folder; rank 0 takes away signs of ranks that this start has not."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._process.first:
                for file in self._folder.glob("rank_*.json"):
                    if int(file.stem.removeprefix("rank_")) >= self._process.world:
                        file.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s: %s", self._folder, error.strerror)

    def _file(self, suffix: str) -> Path:
        return self._folder / f"{self._name}{suffix}"


def _elsewhere(signs: list[dict[str, Any]], here: Process, place: _Place, every_s: float) -> str:
    """Which ranks are silent, or else not where this one is: those it waits for."""
    now, others = time.time(), [sign for sign in signs if sign["rank"] != here.rank]
    silent = [sign for sign in others if now - sign["time"] > SILENT * every_s]
    away = silent or [sign for sign in others if (sign["step"], sign["phase"]) != (place.step, place.phase)]
    shown = [
        f"rank {s['rank']} on {s['host']} is at step {s['step']}, {s['phase']}"
        + (f", and gave no sign of life for {now - s['time']:.0f} s" if silent else f", for {s['since']:.0f} s")
        for s in away
    ]
    unseen = sorted(set(range(here.world)) - {sign["rank"] for sign in signs} - {here.rank})
    shown += [f"rank {rank} gave no sign of life yet" for rank in unseen]
    return "".join(f"{line}. " for line in shown[:8])
