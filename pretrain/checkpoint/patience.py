"""Reads that fail for a while: a store that does not answer, a network file system that is away for a moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from pretrain.checkpoint.errors import CheckpointError, CheckpointUnreadableError

PAUSES_S = (0.5, 2.0, 8.0)
"""Seconds before a read is tried again; after the last it has failed."""

T = TypeVar("T")

_NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def patiently(read: Callable[..., T], *args: Any) -> T:
    """`read(*args)`, tried again where its OSError may pass."""
    for pause_s in PAUSES_S:
        try:
            return read(*args)
        except (*_NO_FILE, PermissionError):
            raise
        except OSError:
            time.sleep(pause_s)
    return read(*args)


def unreadable(what: str, error: OSError) -> CheckpointError:
    """What to raise where `what` could not be read: damage where there is no such file, else nothing is known of it."""
    if isinstance(error, _NO_FILE):
        return CheckpointError(f"{what} cannot be read ({error.strerror}); use another checkpoint")
    return CheckpointUnreadableError(
        f"{what} cannot be read ({error.strerror}): see that the place answers and may be read; what lies there is "
        f"untouched, and the same command tries again"
    )
