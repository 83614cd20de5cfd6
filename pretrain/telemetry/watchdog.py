"""A rank that stands still writes down where every thread of it stands, and ends, so that the run can be taken up.

The clock runs in a thread of Python, which goes on while the main thread waits in a collective. Should a C call keep
the interpreter itself, faulthandler's own thread, which needs no interpreter, shows the stacks; it ends nothing, since
it cannot tell that from a process that was suspended. The other ranks, which wait for this one, do.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pretrain.exit_codes import HUNG

STDERR = 2
_LAST_WORDS_S = 30  # a file system that hangs must not keep the process


class Watchdog:
    """Ends this process with exit code HUNG when `place()` gave the same object for `limit_s()` seconds.

    `describe(seconds)` is the line that says who stands where; stacks go to stderr and to the file `stacks`.
    """

    def __init__(
        self,
        place: Callable[[], object],
        limit_s: Callable[[], float],
        describe: Callable[[float], str],
        stacks: Path,
    ) -> None:
        self._place, self._limit_s, self._describe = place, limit_s, describe
        self._stacks = stacks
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        seen, stood_s, looked = self._place(), 0.0, time.monotonic()
        while True:
            limit_s = self._limit_s()
            pause_s = min(1.0, limit_s / 10)
            faulthandler.dump_traceback_later(limit_s + pause_s, file=STDERR)
            if self._closed.wait(pause_s):
                return
            place, now = self._place(), time.monotonic()
            # a process that was itself suspended has lost time, not stood still: a look counts twice its pause at most
            stood_s = stood_s + min(now - looked, 2 * pause_s) if place is seen else 0.0
            seen, looked = place, now
            if stood_s >= limit_s:
                self._end(stood_s)

    def _end(self, stood_s: float) -> None:
        faulthandler.dump_traceback_later(_LAST_WORDS_S, exit=True, file=STDERR)
        try:
            faulthandler.dump_traceback(STDERR, all_threads=True)  # first: what follows reads files, which may hang too
            line = self._describe(stood_s)
            print(line, file=sys.stderr, flush=True)
            with open(self._stacks, "w") as file:
                print(line, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        finally:
            os._exit(HUNG)
