"""Runs of the trainer as its users start them, and what they left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from pretrain.__main__ import main
from pretrain.checkpoint import find_latest
from pretrain.telemetry import read_log

ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}


def start(*argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain", *argv], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )


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


def wait_for_a_step(log: Path, process: subprocess.Popen) -> None:
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
