"""A profile of a run that is going on, on demand: `polyview profile RUN` asks, the loop answers.

The request is a file, RUN/PROFILE. Rank 0 looks for it once a second and says so to the others through the flags they
share anyway, so all ranks record the same steps. Each writes RUN/profile/step_N/rank_R.json.gz (for
https://ui.perfetto.dev or chrome://tracing) and, last, a table of its costliest operators beside it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pretrain.distributed.process import Process
from pretrain.telemetry.profile_request import FOLDER, REQUEST, read_request

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
ROWS = 30


class ProfileWindow:
    """Records a few steps of the run in `folder` whenever it is asked to; no error in it ends the run.

    may_write: raises where a later start has taken the run over, asked before anything is written.
    """

    def __init__(self, folder: Path, process: Process, may_write: Callable[[], None] = lambda: None) -> None:
        self._folder, self._process, self._may_write = folder, process, may_write
        self._looked_at = 0.0
        self._served: dict[str, Any] | None = None
        self._profile: profile | None = None
        self._first = self._left = 0

    def wanted(self) -> bool:
        """Whether a profile is asked for that is not being made: the flag that rank 0 shares. Cheap at every step."""
        now = time.monotonic()
        if not self._process.first or self._profile is not None or now - self._looked_at < LOOK_EVERY_S:
            return False
        self._looked_at = now
        return (self._folder / REQUEST).exists()

    def start(self, step: int) -> None:
        """Record from here on, after 1-based `step`, for as many steps as are asked; on all ranks at one step."""
        request = read_request(self._folder)
        if self._profile is not None or request is None or request == self._served:
            return
        self._served, self._first, self._left = request, step + 1, request["steps"]
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._process.device.type == "cuda")
        try:
            recording = profile(activities=activities)
            recording.start()
        except RuntimeError as error:
            self._failed(f"rank {self._process.rank} cannot be profiled: {error}")
            return
        self._profile = recording

    def step(self) -> None:
        """A step is over; after the last one that is asked for, the recording is written."""
        if self._profile is None:
            return
        self._left -= 1
        if self._left <= 0:
            self.stop()

    def stop(self) -> None:
        """Write what was recorded so far, if anything is."""
        if self._profile is None:
            return
        recording, self._profile = self._profile, None
        try:
            if self._process.device.type == "cuda":
                torch.cuda.synchronize(self._process.device)
            recording.stop()
            self._write(recording)
        except (OSError, RuntimeError) as error:
            self._failed(f"the profile of rank {self._process.rank} was not written: {error}")
        self._withdraw()

    def _failed(self, why: str) -> None:
        """Say so here, and to whoever waits for the profile."""
        log.warning(why)
        with suppress(OSError):
            folder, name = self._place()
            (folder / f"{name}.failed").write_text(why + "\n")
        self._withdraw()

    def _place(self) -> tuple[Path, str]:
        self._may_write()
        folder = self._folder / FOLDER / f"step_{self._first:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder, f"rank_{self._process.rank:05d}"

    def _write(self, recording: profile) -> None:
        folder, name = self._place()
        recording.export_chrome_trace(str(folder / f"{name}.json.gz"))
        by = "self_device_time_total" if self._process.device.type == "cuda" else "self_cpu_time_total"
        table = recording.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60)
        aside = folder / f".{name}.txt"
        aside.write_text(table + "\n")
        os.replace(aside, folder / f"{name}.txt")  # whoever waits for it finds it whole, and the trace before it

    def _withdraw(self) -> None:
        if self._process.first:
            self._may_write()  # the request may be to a later start
            (self._folder / REQUEST).unlink(missing_ok=True)
