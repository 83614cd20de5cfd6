"""Start a recipe's world on this machine: what `python -m pretrain RECIPE` does when no launcher did.

One process a rank, on loopback, forked: what is slow to import is imported once. A rank that dies takes the others
with it, and they die with their parent, even when that is killed outright: no orphan may go on writing into a run that
is being resumed.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess

import torch

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


def run_world(world: int, main: Callable[..., int | None], *args: object) -> int:
    """Call ``main(*args)`` as `world` ranks and wait; 0, or the exit code that tells most (`exit_codes.of_world`).

    Call it in a process that has neither touched a GPU nor gone backward: what those start does not survive a fork.
    """
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world)}
    # libraries that default to all cores in every rank would fight each other
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world)))
    environment["OMP_NUM_THREADS"] = threads
    ranks: list[BaseProcess] = []
    handed_on: set[int] = set()

    def hand_on(number: int, _frame: object) -> None:
        handed_on.add(number)
        _tell(ranks, number)

    # what arrives meanwhile waits until all ranks are there, and until each can take it
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for stop in STOP_SIGNALS:
        signal.signal(stop, hand_on)
    interrupt = signal.getsignal(signal.SIGINT)
    fork = multiprocessing.get_context("fork")
    for rank in range(world):
        whose = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(fork.Process(target=_be_rank, args=(whose, os.getpid(), main, args)))
        ranks[-1].start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal it reaches the ranks by itself
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    code = _wait(ranks, handed_on)
    signal.signal(signal.SIGINT, interrupt)
    return code


def _be_rank(environment: Mapping[str, str], parent: int, main: Callable[..., int | None], args: Sequence) -> None:
    """What a rank does, from its birth to its exit code."""
    atexit._clear()  # what the parent is to do at its end
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        sys.exit(main(*args))
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its children without that


def _wait(ranks: list[BaseProcess], handed_on: set[int]) -> int:
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


def _ended(rank: BaseProcess, handed_on: set[int]) -> int | None:
    """Its exit code so far; one that a handed-on signal ended before it listened has lost nothing, and was stopped."""
    code = rank.exitcode
    return STOPPED if code is not None and -code in handed_on else code


def _bring_down(ranks: list[BaseProcess], handed_on: set[int]) -> int:
    own = _settled(ranks, handed_on)
    code = of_world(list(own.values()))
    _tell(ranks, signal.SIGTERM)
    # behind an error a save under way may become whole; whoever waits for a rank that is gone or hangs never ends
    deadline = time.monotonic() + (5 if code == HUNG or code > 128 else GRACE_S)
    for rank in ranks:
        rank.join(max(0.1, deadline - time.monotonic()))
        rank.kill()
        rank.join()
    for number, ended in own.items():
        if ended < 0:
            name = signal.Signals(-ended).name
            print(f"rank {number} was killed by {name}; the same command resumes the run", file=sys.stderr)
    return code


def _settled(ranks: list[BaseProcess], handed_on: set[int]) -> dict[int, int]:
    """Exit codes of the ranks that ended by themselves, once one of them tells why (or none has for a while)."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        time.sleep(0.5)  # the same error on all ranks: let them print it
        codes = {i: code for i, rank in enumerate(ranks) if (code := _ended(rank, handed_on)) is not None}
        if set(codes.values()) - {LOST, DONE, STOPPED} or len(codes) == len(ranks) or time.monotonic() > deadline:
            return codes


def _tell(ranks: list[BaseProcess], number: int) -> None:
    for rank in ranks:
        if rank.pid and rank.exitcode is None:
            os.kill(rank.pid, number)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
