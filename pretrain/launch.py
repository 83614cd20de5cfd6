"""Start a recipe's world on this machine: what `python -m pretrain RECIPE` does when no launcher did.

One process a rank, on loopback. A rank that dies takes the others with it, and they die with their parent, even
when that is killed outright: no orphan may go on writing into a run that is being resumed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

GRACE_S = 60
"""Seconds the ranks have to save after a signal or another rank's death."""
_PR_SET_PDEATHSIG = 1


def launched() -> bool:
    """Whether some launcher started this process (then it decided the world)."""
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ  # accelerate sets it for one rank too


def run_world(world: int, argv: Sequence[str]) -> int:
    """Run ``python ARGV`` as `world` ranks and wait; the first exit code that is not 0, else 0."""
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(world),
    }
    # libraries that default to all cores in every rank would fight each other
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world)))
    ranks = [_start(argv, environment | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(world)]
    # SIGINT from a terminal reaches the ranks by itself; SIGTERM and SIGUSR1 (Slurm's warning) are handed on
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _: _tell(ranks, received))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return _wait(ranks)


def _start(argv: Sequence[str], environment: dict[str, str]) -> subprocess.Popen:
    parent = os.getpid()

    def die_with_parent() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call above
            os._exit(1)

    return subprocess.Popen([sys.executable, *argv], env=environment, preexec_fn=die_with_parent)


def _wait(ranks: list[subprocess.Popen]) -> int:
    while True:
        codes = [r.poll() for r in ranks]
        failed = next((i for i, code in enumerate(codes) if code), None)
        if failed is not None:
            return _bring_down(ranks, failed)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


def _bring_down(ranks: list[subprocess.Popen], failed: int) -> int:
    time.sleep(0.5)  # the same error on all ranks: let them print it
    _tell(ranks, signal.SIGTERM)
    deadline = time.monotonic() + (5 if ranks[failed].returncode < 0 else GRACE_S)
    for rank in ranks:
        try:
            rank.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
    code = ranks[failed].returncode
    if code < 0:
        print(
            f"rank {failed} was killed by {signal.Signals(-code).name}; the same command resumes the run",
            file=sys.stderr,
        )
    return code if code > 0 else 128 - code


def _tell(ranks: list[subprocess.Popen], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
