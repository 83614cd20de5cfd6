"""Every door answers at once, and its errors are for people."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import polyview

PACKAGES = ("pretrain", "index", "downstream", "slurm")


def python(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True)


@pytest.mark.parametrize("door", [("-m", p, "--help") for p in PACKAGES] + [("-m", "polyview", "--help")])
def test_help_answers_within_a_second_without_torch(door):
    # three tries: the machine may be busy
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = python("-X", "importtime", *door)
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 1:
            break
    assert done.returncode == 0
    assert "usage" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "faiss", "PIL", "pydantic"}
    assert min(seconds) < 1


@pytest.mark.parametrize("verb", sorted(polyview.verbs()))
def test_every_verb_explains_itself_without_torch(verb):
    code = (
        "import sys, polyview\n"
        f"try: polyview.main([{verb!r}, '--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 80


def test_a_wrong_verb_is_answered_with_the_nearest():
    done = python("-m", "index", "serach")
    assert done.returncode == 2
    assert "did you mean 'search'" in done.stderr


def test_user_errors_come_without_a_traceback():
    done = python("-m", "pretrain", "no-such-recipe.yaml")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "no recipe" in done.stderr
