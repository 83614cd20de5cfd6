"""What a world started on this machine ends with, when its ranks end differently."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from pretrain.exit_codes import CRASH_LOOP, CRASHED, DONE, HUNG, LOST, REFUSED, STOPPED, of_world
from tests.runs import LAUNCH

RANK = "import os, signal, sys, time; first = os.environ['RANK'] == '0'; "


def launch(code: str) -> subprocess.Popen:
    """Two ranks that run `code`, which knows whether it is `first`; each says when it is there."""
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, RANK + code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


CASES = {
    "time.sleep(0 if first else 1); sys.exit(85 if first else 2)": REFUSED,  # the lost one ends first, and says nothing
    "sys.exit(85) if first else os.kill(os.getpid(), signal.SIGKILL)": 128 + signal.SIGKILL,
    "sys.exit(86) if first else os.kill(os.getpid(), signal.SIGSTOP)": HUNG,
    "sys.exit(1) if first else time.sleep(300)": CRASHED,
    "sys.exit(0)": DONE,
}


def test_the_rank_that_tells_most_gives_the_exit_code():
    begin = time.monotonic()
    worlds = {code: launch(code) for code in CASES}
    told = {code: world.communicate(timeout=60)[1] for code, world in worlds.items()}
    assert {code: world.returncode for code, world in worlds.items()} == CASES, told
    assert time.monotonic() - begin < 50
    assert "rank 1 was killed by SIGKILL; the same command resumes" in told[list(CASES)[1]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_is_handed_on_and_what_it_finds_unprepared_was_stopped_too(number):
    """Rank 0 listens, saves and says so; rank 1 is still starting and dies of it."""
    listen = f"first and signal.signal({int(number)}, lambda *_: sys.exit(75))"
    world = launch(f"{listen}; os.write(1, b'here\\n'); time.sleep(300)")
    assert [world.stdout.readline() for _ in range(2)] == ["here\n"] * 2
    world.send_signal(number)
    _, told = world.communicate(timeout=60)
    assert world.returncode == STOPPED, told


def test_what_cannot_be_mended_by_trying_again_comes_first():
    assert of_world([LOST, -9, REFUSED, CRASHED]) == REFUSED
    assert of_world([LOST, CRASH_LOOP, CRASH_LOOP]) == CRASH_LOOP
    assert of_world([CRASHED, HUNG, -9]) == 137
    assert of_world([3, LOST, HUNG]) == HUNG
    assert of_world([LOST, STOPPED]) == STOPPED
    assert of_world([LOST]) == LOST
    assert of_world([DONE, DONE]) == DONE
