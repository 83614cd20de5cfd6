"""How a training command ends, for scripts and schedulers: `while` it is none of DONE and FINAL, start it again."""

from __future__ import annotations

DONE = 0
CRASHED = 1
REFUSED = 2
STOPPED = 75
LOST = 85
HUNG = 86
NOT_FINITE = 87
CRASH_LOOP = 88

TABLE = """\
exit codes, and what the same command does next:
  0    trained to its last step
  1    crashed: goes on from the newest checkpoint
  2    something in the recipe, the data or the machine must be put right first: the message says what
  75   stopped by a signal and saved: goes on from there
  85   another rank ended first, and this one with it: goes on from the newest checkpoint
  86   no progress for faults.hang_s seconds (where every thread stood is in RUN/heartbeat): goes on
  87   loss or gradient not finite: gives the same again, see `polyview replay`
  88   crashed faults.max_crashes times at the same step: refused
  128+n  killed by signal n (137: SIGKILL, often for want of memory): goes on from the newest checkpoint"""
"""Shown by `train --help`."""

FINAL = (REFUSED, NOT_FINITE, CRASH_LOOP)
"""Trying again without a change gives the same."""


def of_world(codes: list[int]) -> int:
    """One exit code for ranks that ended by themselves with `codes` (negative: killed by that signal).

    What cannot be mended by trying again comes first, then what brought the others down; a rank that was merely lost
    with another says nothing.
    """
    worst = min(codes, key=_order, default=CRASHED)
    return 128 - worst if worst < 0 else worst


def _order(code: int) -> tuple[int, int]:
    if code in FINAL:
        return 0, FINAL.index(code)
    if code < 0:
        return 1, -code
    known = (HUNG, CRASHED, STOPPED, LOST, DONE)
    return 2, known.index(code) if code in known else 1
