"""Python's garbage collector at the same step on all ranks, not at a moment of its own on each: one rank that stops
to collect is one that all others wait for (as torchtitan has it)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 1000
"""Steps between collections."""


@contextmanager
def collected_together() -> Iterator[Callable[[int], None]]:
    """Nothing is collected inside but by the function it gives, which is called with the number of every step."""
    was_on = gc.isenabled()
    gc.disable()
    gc.collect()
    try:
        yield _collect_at
    finally:
        if was_on:
            gc.enable()


def _collect_at(step: int) -> None:
    if step % EVERY == 0:
        gc.collect(1)  # the oldest generation is the model and stays
