"""A run of the trainer as a user starts it, watched from outside; what it saved, compared tensor by tensor."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from pretrain.checkpoint import Checkpoint, find_latest, open_checkpoint
from pretrain.recipe import Recipe, dump_recipe
from pretrain.telemetry import read_events
from pretrain.telemetry.runlog import read_lines
from tests.runs import start

PATIENCE_S = 300.0


class Run:
    """A run folder, and the same command again and again."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.folder = recipe, recipe.output
        self.file = recipe.output.with_suffix(".yaml")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(dump_recipe(recipe))
        self.codes: list[int] = []
        self.told = ""
        """What the newest start said on stderr."""

    def start(self, *, file_limit: int | None = None) -> Start:
        """The command, under way. `file_limit`: bytes that no file may grow beyond, as on a full disk."""
        return Start(self, file_limit)

    def finish(self) -> int:
        """The command, to its end; its exit code."""
        return self.start().wait()

    def saved(self) -> Checkpoint | None:
        """The newest whole checkpoint, every byte of it checked."""
        return find_latest(self.folder / "checkpoints", verify=True)

    def saved_steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        return sorted(int(p.parent.name.removeprefix("step_")) for p in self.folder.glob("checkpoints/*/manifest.json"))

    def logged_saves(self) -> list[int]:
        """Steps that the log says are saved."""
        log = self.folder / "log.jsonl"
        return [e["step"] for e in read_events(log) if e["event"] == "save"] if log.is_file() else []


class Start:
    """One start of a run: the launcher and its ranks."""

    def __init__(self, run: Run, file_limit: int | None) -> None:
        self.run = run
        self._log = run.folder.with_suffix(f".{len(run.codes)}.log")
        self._lines = run.folder / "log.jsonl"
        self._before = self._lines.stat().st_size if self._lines.is_file() else 0
        self._process = start(str(run.file), log=self._log, file_limit=file_limit)
        self.pid = self._process.pid
        self._ranks: list[int] = []

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    def wait(self) -> int:
        """Its exit code (negative: killed by that signal), when the last of its ranks is gone too."""
        code = self._process.wait(PATIENCE_S)
        while any(Path(f"/proc/{pid}").exists() for pid in self._ranks):
            time.sleep(0.02)
        self.run.codes.append(code)
        self.run.told = self._log.read_text()
        return code

    def send(self, number: signal.Signals, rank: int | None = None) -> bool:
        """Send a signal to a rank, or to the launcher; False when it or any rank has ended."""
        with suppress(OSError, IndexError):
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
            self._ranks = [int(pid) for pid in children.split()]  # in the order of their start
            if not self.ended and len(self._ranks) == self.run.recipe.world:
                os.kill(self.pid if rank is None else self._ranks[rank], number)
                return True
        return False

    def until_step(self, step: int) -> bool:
        """Wait until this start has logged `step`; False when it ended before."""
        return self._until(lambda: self._logged() >= step)

    def until_saving(self) -> bool:
        """Wait until a checkpoint is being written; False when the run ended before."""
        return self._until(self._saving)

    def until_saved(self, count: int) -> bool:
        """Wait until so many checkpoints are whole; False when the run ended before."""
        return self._until(lambda: len(self.run.saved_steps()) >= count)

    def _until(self, true: Callable[[], bool]) -> bool:
        while not self.ended:
            if true():
                return True
            time.sleep(0.002)
        return False

    def _logged(self) -> int:
        if not self._lines.is_file() or self._lines.stat().st_size <= self._before:
            return 0
        return max((line["step"] for line in read_lines(self._lines) if "event" not in line), default=0)

    def _saving(self) -> bool:
        steps = self.run.folder.glob("checkpoints/step_*")
        with suppress(FileNotFoundError):  # an old one goes in between
            return any(not (step / "manifest.json").exists() and any(step.iterdir()) for step in steps)
        return False


def differences(expected: Checkpoint, found: Checkpoint) -> list[str]:
    """Names of the tensors (weights, optimizer, objectives) that are not bit for bit the same."""
    if set(expected.names()) != set(found.names()):
        return sorted(set(expected.names()) ^ set(found.names()))
    return [n for n in expected.names() if not _same(expected.read(n), found.read(n))]


def step_of(run: Run, step: int) -> Checkpoint:
    """The whole checkpoint of `step`."""
    return open_checkpoint(run.folder / "checkpoints" / f"step_{step:08d}")


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
