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

from pretrain.exit_codes import DONE, HUNG, LOST, STOPPED, of_world

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers send to a run that is to save and end (Slurm's warning is any the job asked for)."""
GRACE_S = 60
"""Seconds the ranks have to end after one of them met an error."""
SETTLE_S = 10
"""Seconds until a rank that was only lost with another is taken for the cause."""
POLL_S = 0.1
_PR_SET_PDEATHSIG = 1


def launched() -> bool:
    """Whether some launcher started this process (then it decided the world)."""
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ  # accelerate sets it for one rank too


def run_world(world: int, argv: Sequence[str]) -> int:
    """Run ``python ARGV`` as `world` ranks and wait; 0, or the exit code that tells most (`exit_codes.of_world`)."""
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(world),
    }
    # libraries that default to all cores in every rank would fight each other
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world)))
    ranks: list[subprocess.Popen] = []
    handed_on: set[int] = set()

    def hand_on(number: int, _frame: object) -> None:
        handed_on.add(number)
        _tell(ranks, number)

    for stop in STOP_SIGNALS:
        signal.signal(stop, hand_on)
    for rank in range(world):
        ranks.append(_start(argv, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal it reaches the ranks by itself
    for number in tuple(handed_on):
        _tell(ranks, number)  # to those that were not there yet
    return _wait(ranks, handed_on)


def _start(argv: Sequence[str], environment: dict[str, str]) -> subprocess.Popen:
    parent = os.getpid()

    def die_with_parent() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call above
            os._exit(1)

    return subprocess.Popen([sys.executable, *argv], env=environment, preexec_fn=die_with_parent)


def _wait(ranks: list[subprocess.Popen], handed_on: set[int]) -> int:
    patience = GRACE_S / POLL_S
    while patience > 0:
        ended = [code for rank in ranks if (code := _ended(rank, handed_on)) is not None]
        if any(code not in (DONE, STOPPED) for code in ended):
            break
        if len(ended) == len(ranks):
            return of_world(ended)
        patience -= bool(ended)  # all leave together: who stays behind hangs
        time.sleep(POLL_S)
    return _bring_down(ranks, handed_on)


def _ended(rank: subprocess.Popen, handed_on: set[int]) -> int | None:
    """Its exit code so far; one that a handed-on signal ended before it listened has lost nothing, and was stopped."""
    code = rank.poll()
    return STOPPED if code is not None and -code in handed_on else code


def _bring_down(ranks: list[subprocess.Popen], handed_on: set[int]) -> int:
    own = _settled(ranks, handed_on)
    code = of_world(list(own.values()))
    _tell(ranks, signal.SIGTERM)
    # behind an error a save under way may become whole; whoever waits for a rank that is gone or hangs never ends
    deadline = time.monotonic() + (5 if code == HUNG or code > 128 else GRACE_S)
    for rank in ranks:
        try:
            rank.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
    for number, ended in own.items():
        if ended < 0:
            name = signal.Signals(-ended).name
            print(f"rank {number} was killed by {name}; the same command resumes the run", file=sys.stderr)
    return code


def _settled(ranks: list[subprocess.Popen], handed_on: set[int]) -> dict[int, int]:
    """Exit codes of the ranks that ended by themselves, once one of them tells why (or none has for a while)."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        time.sleep(0.5)  # the same error on all ranks: let them print it
        codes = {i: code for i, rank in enumerate(ranks) if (code := _ended(rank, handed_on)) is not None}
        if set(codes.values()) - {LOST, DONE, STOPPED} or len(codes) == len(ranks) or time.monotonic() > deadline:
            return codes


def _tell(ranks: list[subprocess.Popen], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
