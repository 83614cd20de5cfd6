"""The run log: RUN/log.jsonl, one JSON object a logged step or event; TensorBoard and the progress line
beside it.

A step's line is {"step", "time", "samples_seen", "epoch", "loss", "loss/<objective>", "lr", "images_per_s",
"step_s", "data_wait", "memory_gib", "grad_norm", ...}: whatever numbers the trainer gives. An event's line is
{"event": "start" | "resume" | "save" | "stop" | ..., "step", "time", ...}. The file is only ever appended to,
so a crash costs at most a half-written last line; a resume leaves the lines it overtakes and `read_log` drops
them. JSON has no NaN: numbers that are not finite become null and are named under "nonfinite".

TensorBoard gets the same numbers, purged at a resume; without the package it is left out with one warning. So does
W&B where the recipe asks for it. Neither is a source of truth: nothing in polyview reads them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from pretrain.recipe import Recipe
from pretrain.telemetry.progress import Progress
from pretrain.telemetry.wandb_sink import WandbSink

log = logging.getLogger(__name__)

FILE = "log.jsonl"
NOT_PLOTTED = ("step", "time", "samples_seen", "epoch")


class RunLog:
    """Writes the log of the run in folder `run`, on rank 0; on other ranks every call does nothing.

    resume_step: the step the run is taken up again after (None: it starts from nothing). total_steps: for the
    ETA. recipe: what W&B is told, where its `log.wandb` asks for it. stream: of the progress line, default stderr. The
    first line is the "start" or "resume" event. may_write: raises where a later start has taken the run over, asked
    before each line.

    Raises:
        UserError: W&B is asked for, but not installed, or nobody is logged in.
    """

    def __init__(
        self,
        run: Path,
        *,
        total_steps: int,
        resume_step: int | None = None,
        rank: int = 0,
        tensorboard: bool = True,
        recipe: Recipe | None = None,
        stream: TextIO | None = None,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        self.active = rank == 0
        if not self.active:
            return
        self._may_write = may_write
        may_write()
        run.mkdir(parents=True, exist_ok=True)
        self._wandb = WandbSink(run, recipe.log.wandb, recipe) if recipe and recipe.log.wandb else None
        self.path = run / FILE
        self._fd = _open_for_append(self.path)
        self._torn = False  # the last line is half-written
        self._board = _open_board(run / "tensorboard", resume_step) if tensorboard else None
        self._progress = Progress(total_steps, stream=stream)
        self.event("start" if resume_step is None else "resume", step=resume_step or 0, total_steps=total_steps)

    def step(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Log the numbers of `step`. Tensors of one element are read here, which waits for the device."""
        if not self.active:
            return
        plain = {name: _plain(value) for name, value in numbers.items()}
        now = time.time()
        self._append({"step": step, "time": now, **plain})
        self._progress.update(step, plain)
        self._plot(step, plain, now)
        if self._wandb is not None:
            self._wandb.step(step, plain)

    def event(self, event: str, **fields: Any) -> None:
        """Log that something happened; an event "save" with its step shows in the progress line too."""
        if not self.active:
            return
        self._append({"event": event, "time": time.time(), **{k: _plain(v) for k, v in fields.items()}})
        if event == "save" and "step" in fields:
            self._progress.saved(int(fields["step"]))

    def close(self) -> None:
        if not self.active:
            return
        self._may_write()  # closing TensorBoard and W&B writes what they keep back
        self.active = False
        self._progress.close()
        os.close(self._fd)
        if self._board is not None:
            with suppress(OSError):  # the disk is full: the same numbers are in the log
                self._board.close()
        if self._wandb is not None:
            self._wandb.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plot(self, step: int, plain: Mapping[str, Any], now: float) -> None:
        if self._board is None:
            return
        try:
            for name, value in plain.items():
                if name not in NOT_PLOTTED and isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step, walltime=now)
        except OSError as e:  # its writing thread met a full disk, and takes nothing any more
            log.warning("%s: TensorBoard gets no more until the next start (%s)", self.path.parent, e.strerror)
            self._board = None

    def _append(self, record: dict[str, Any]) -> None:
        broken = [name for name, value in record.items() if _finite(value) != value]
        if broken:
            record = {**record, **{name: _finite(record[name]) for name in broken}, "nonfinite": broken}
        self._may_write()
        line = b"\n" * self._torn + json.dumps(record, allow_nan=False, default=str).encode() + b"\n"
        try:
            self._torn = os.write(self._fd, line) < len(line)  # one call, so that lines are never mixed
        except OSError as e:  # a full disk must not end the training for a line of its diary
            log.warning("%s: step not logged (%s)", self.path, e.strerror)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The steps of a run (its folder or log file) as they stand: one record a step, in order.

    Steps that a resume overtook (logged after the step it resumed from) are dropped, and everything before a
    fresh "start"; of a step logged twice the last line holds. Lines that cannot be read are passed over.
    """
    steps: dict[int, dict[str, Any]] = {}
    for record in read_lines(path):
        if record.get("event") in ("start", "resume"):
            after = record.get("step") or 0
            steps = {s: r for s, r in steps.items() if s <= after and record["event"] == "resume"}
        elif "event" not in record and isinstance(record.get("step"), int):
            steps[record["step"]] = record
    return [steps[s] for s in sorted(steps)]


def read_events(path: Path) -> list[dict[str, Any]]:
    """Every event of a run (its folder or log file), in the order they happened."""
    return [record for record in read_lines(path) if "event" in record]


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """All readable lines of a log, overtaken ones too. A half-written one (a crash, a live run) is none."""
    file = path / FILE if path.is_dir() else path
    with file.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _plain(value: Any) -> Any:
    """Python's own numbers for tensors and numpy's of one element; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def _finite(value: Any) -> Any:
    """`value` with None for every number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_finite, value))
    return value


def _open_for_append(path: Path) -> int:
    """A descriptor at the end of `path`; a half-written last line is closed off first."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    size = os.fstat(fd).st_size
    if size and os.pread(fd, 1, size - 1) != b"\n":
        os.write(fd, b"\n")
    return fd


def _open_board(folder: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning("TensorBoard is not installed: %s stays empty (pip install tensorboard)", folder)
        return None
    return SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)
