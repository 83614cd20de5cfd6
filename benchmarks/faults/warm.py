"""The trainer's command in processes that are forked with its imports behind them: where a shell's takes 25 CPU seconds
to start three ranks, this takes 5. Everything else of it, launcher and ranks, is the real thing.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NoReturn

from pretrain import launch

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["pretrain.train", "pretrain.backends.ddp", "pretrain.backends.fsdp2"])


def start(argv: Sequence[str], log: Path, file_limit: int | None) -> ForkServerProcess:
    """``python -m pretrain ARGV`` under way in a session of its own, its output in file `log`."""
    process = _SERVER.Process(target=_launcher, args=(argv, log, file_limit))
    process.start()
    return process


def _launcher(argv: Sequence[str], log: Path, file_limit: int | None) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
    logging.getLogger().handlers.clear()
    for variable in ("RANK", "WORLD_SIZE"):
        os.environ.pop(variable, None)
    os.environ["OMP_NUM_THREADS"] = "1"
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    launch._start = _Rank  # type: ignore[assignment]
    _run(argv)


class _Rank:
    """A forked rank behind what the launcher asks of a `subprocess.Popen`."""

    def __init__(self, argv: Sequence[str], environment: dict[str, str]) -> None:
        self.returncode: int | None = None
        parent = os.getpid()
        self._pid = os.fork()
        if not self._pid:
            ctypes.CDLL(None).prctl(launch._PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            for number in launch.STOP_SIGNALS:  # as an executed program finds them
                signal.signal(number, signal.SIG_DFL)
            os.environ.update(environment)
            _run(argv[2:])

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 60) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise launch.subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self._pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(argv: Sequence[str]) -> NoReturn:
    import torch

    from pretrain.__main__ import main

    torch.set_num_threads(1)
    code = _exit_code(lambda: main(argv))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code(run: Callable[[], int]) -> int:
    try:
        return run()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
