"""Runs of the trainer as its users start them, and what they left behind."""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pretrain.__main__ import main
from pretrain.checkpoint import find_latest
from pretrain.telemetry import read_log
from tests.ranks import SERVER

LAUNCH = "import sys; from pretrain.launch import run_world; sys.exit(run_world(2, exec, sys.argv.pop(1), {}))"
"""Two ranks of the code given as the next argument."""
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in LAUNCHED} | {"OMP_NUM_THREADS": "1"}


class Start:
    """``python -m pretrain ARGV`` under way, in a session of its own: as a shell starts it, but forked from a server
    that has the imports behind it. Named as in `subprocess.Popen`."""

    def __init__(self, argv: Sequence[str], log: Path, file_limit: int | None) -> None:
        self._log = log
        self._process = SERVER.Process(target=_command, args=(argv, log, file_limit))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise TimeoutError(f"not at its end after {timeout:.0f} s: {self._log.read_text()}")
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Its end; what was said on stdout and stderr."""
        self.wait(timeout)
        return None, self._log.read_text()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(*argv: str, log: Path | None = None, file_limit: int | None = None) -> Start:
    """The command under way, its output in file `log`; `file_limit`: bytes that no file may grow beyond."""
    return Start(argv, log or Path(tempfile.mkstemp(suffix=".log")[1]), file_limit)


def _command(argv: Sequence[str], log: Path, file_limit: int | None) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
    logging.getLogger().handlers.clear()
    for variable in LAUNCHED:
        os.environ.pop(variable, None)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.exit(main(argv))


def train_here(recipe: Path, *overrides: str) -> int:
    """The same command in this process, on one rank; its exit code."""
    return main([str(recipe), *overrides])


def train(*argv: str) -> str:
    """Run to the end; what was said on stderr."""
    process = start(*argv)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    return told


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = find_latest(run / "checkpoints")
    assert checkpoint is not None
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_log(run / "log.jsonl")}


def wait_for_a_step(log: Path, process: Start) -> None:
    """Until this start has logged a step of its own."""
    size = log.stat().st_size if log.is_file() else 0
    while process.poll() is None and not (log.is_file() and log.stat().st_size > size + 400):
        time.sleep(0.02)


def kill_and_resume(recipe: Path, run: Path, times: int = 2) -> None:
    """Train to the end, killed outright at moments that differ each time, during saves too."""
    for _ in range(times):
        process = start(str(recipe))
        wait_for_a_step(run / "log.jsonl", process)
        time.sleep(random.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    train(str(recipe))
