"""Asking a run for a profile from outside, and waiting for it; see `pretrain.telemetry.profiler`. No torch here."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.telemetry.alive import alive

REQUEST = "PROFILE"
FOLDER = "profile"
MOST_STEPS = 100
"""A trace of more is too large to open."""
OTHERS_S = 60.0
"""Until all ranks have written what the first has."""


def profile_run(folder: Path, steps: int, *, look_every_s: float = 0.5) -> Path:
    """Ask the run in `folder` for a profile of its next `steps` steps and wait for all ranks; the folder it is in.

    Raises:
        UserError: no such run, it is not going on, it ended before the profile was whole, a rank could not make its
            own, or another is being made.
    """
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not a run: it has no recipe.yaml")
    if not 1 <= steps <= MOST_STEPS:
        raise UserError(f"--steps {steps}: between 1 and {MOST_STEPS}")
    if not alive(folder):
        raise UserError(f"{folder}: nobody trains there now, so there is nothing to profile; start the run first")
    if (folder / REQUEST).exists():
        raise UserError(f"{folder}: a profile is being made already; wait for it, or remove {folder / REQUEST}")
    before = set(_made(folder))
    write_request(folder, steps)
    try:
        return _wait(folder, before, look_every_s)
    finally:
        (folder / REQUEST).unlink(missing_ok=True)


def _wait(folder: Path, before: set[Path], look_every_s: float) -> Path:
    served = time.monotonic()
    while True:
        alive_now = alive(folder)  # before the folder is looked at: what an ending run still wrote is seen
        for made in set(_made(folder)) - before:
            if failed := sorted(made.glob("rank_*.failed")):
                raise UserError(f"{made}: not whole: {failed[0].read_text().strip()}; ask again")
            if len(list(made.glob("rank_*.txt"))) >= _world(folder):
                return made
        if not alive_now:
            raise UserError(f"{folder}: the run ended before its profile was whole; start it, and ask again")
        if (folder / REQUEST).exists():
            served = time.monotonic()
        elif time.monotonic() - served > OTHERS_S:  # the first rank is done with it
            raise UserError(
                f"{folder}: not every rank has written its profile {OTHERS_S:.0f} s after the first: see the run's own "
                f"messages, and what is in {folder / FOLDER}"
            )
        time.sleep(look_every_s)


def write_request(folder: Path, steps: int) -> None:
    """Ask the run in `folder` for a profile of so many steps."""
    aside = folder / f".{REQUEST}"
    aside.write_text(json.dumps({"steps": steps, "asked": time.time()}))
    os.replace(aside, folder / REQUEST)


def read_request(folder: Path) -> dict[str, Any] | None:
    """What is asked for, {"steps", "asked"}; None where nothing is, or nothing that can be read."""
    try:
        request = json.loads((folder / REQUEST).read_text())
        return {"steps": min(max(1, int(request["steps"])), MOST_STEPS), "asked": float(request["asked"])}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _made(folder: Path) -> list[Path]:
    return list((folder / FOLDER).glob("step_*"))


def _world(folder: Path) -> int:
    """Ranks of the newest start."""
    try:
        return int(json.loads((folder / "run.json").read_text())[-1]["world"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return 1
