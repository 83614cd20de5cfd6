"""Reads that fail for a while: a store that does not answer, a network file system that is away for a moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

PAUSES_S = (0.5, 2.0, 8.0)
"""Seconds before a read is tried again; after the last it has failed."""

T = TypeVar("T")

NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""The answer is that there is no such file: waiting changes nothing."""


def patiently(read: Callable[..., T], *args: Any) -> T:
    """`read(*args)`, tried again where its OSError may pass."""
    for pause_s in PAUSES_S:
        try:
            return read(*args)
        except (*NO_FILE, PermissionError):
            raise
        except OSError:
            time.sleep(pause_s)
    return read(*args)
