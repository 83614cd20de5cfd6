"""Who may write into a run: the start that took hold of it last, named in RUN/attempt.

A lock is not enough on a cluster. A node is given up and its job is queued again while ranks of the start before still
live there, cut off or merely slow; and its lock may stay, held by a rank that does not answer, or by the file system on
its behalf. So each start writes who it is into RUN/attempt, before anything else, and each rank looks there before it
writes: what finds another name there ends, and writes no more. RUN/LOCK keeps two starts from coming to that by
mistake: one that is not an earlier attempt of the same Slurm job is not taken over.

Between a look and the rename of a small file, or the append of a line, a moment remains: a rank that is suspended just
there writes that one line when it goes on. At a manifest there is none (`pretrain.checkpoint.commit`).
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pretrain.durable import write_text
from pretrain.errors import UserError
from pretrain.exit_codes import LOST

log = logging.getLogger(__name__)

ATTEMPT = "attempt"
LOCK = "LOCK"
POLL_S = 0.2
_JOB = {
    "job": "SLURM_JOB_ID", "array": "SLURM_ARRAY_JOB_ID", "task": "SLURM_ARRAY_TASK_ID",
    "cluster": "SLURM_CLUSTER_NAME",
}  # fmt: skip


class SupersededError(UserError):
    """A later start has taken the run over."""

    exit_code = LOST


@dataclass(frozen=True)
class Fence:
    """What start `attempt` of the run in `folder` may still do; the same on all its ranks."""

    folder: Path
    attempt: str

    def superseded(self) -> dict[str, Any] | None:
        """Who holds the run now, when that is another start. What is missing or cannot be read proves nothing."""
        found = _newest(self.folder)
        return found if found.get("id") not in (None, self.attempt) else None

    def check(self) -> None:
        """Raise SupersededError when another start holds the run."""
        if (now := self.superseded()) is not None:
            raise SupersededError(
                f"{self.folder} was taken over by a later start ({named(now)}): this one ({self.attempt}, on "
                f"{platform.node()}) ends here and writes no more. Nothing that was saved is lost"
            )


@contextmanager
def hold(folder: Path, attempt: str, wait_s: float) -> Iterator[None]:
    """Take hold of the run in `folder` for start `attempt`; called by rank 0.

    An earlier attempt of the same Slurm job that holds it is told to leave, and after `wait_s` seconds no longer asked.

    Raises:
        UserError: somebody else holds it: who, and what to do.
        OSError: the folder cannot be written.
    """
    me = _who(attempt)
    while True:
        with open(folder / LOCK, "a+") as handle:
            if _acquired(folder, handle, me, wait_s):
                yield
                return


def named(who: dict[str, Any]) -> str:
    """`who`, as RUN/attempt and RUN/LOCK tell of it, in words."""
    words = [f"process {who.get('pid', 'unknown')} on {who.get('host', 'an unknown host')}"]
    if who.get("job"):
        words += [f"Slurm job {who['job']}, restart {who.get('restart', 0)}"]
    with suppress(TypeError, ValueError, OverflowError, KeyError, OSError):
        words += [f"since {datetime.datetime.fromtimestamp(who['time'], datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"]
    return ", ".join(words)


def _who(attempt: str) -> dict[str, Any]:
    """This process, as another one may want to know it."""
    job = {name: os.environ[variable] for name, variable in _JOB.items() if variable in os.environ}
    if job:
        job["restart"] = os.environ.get("SLURM_RESTART_COUNT", "0")  # Slurm gives none to the first
    return {"id": attempt, "host": platform.node(), "pid": os.getpid(), **job, "time": time.time()}


def _is_earlier(holder: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether `holder` is an attempt of the Slurm job of `me` that was requeued since."""
    if "job" not in me or any(holder.get(name) != me.get(name) for name in _JOB):
        return False
    with suppress(KeyError, TypeError, ValueError):
        return int(holder["restart"]) < int(me["restart"])
    return False


def _acquired(folder: Path, handle: TextIO, me: dict[str, Any], wait_s: float) -> bool:
    """Whether `handle`, which was RUN/LOCK when it was opened, holds the run for `me` now; if not, open it again."""
    if not _locks(handle):
        holder = _read(handle)
        if not _is_earlier(holder, me):
            raise UserError(_refusal(folder, holder))
        _take_over(folder, handle, holder, me, wait_s)
        return False
    if not _is_at(handle, folder / LOCK):
        return False
    if _is_earlier(me, now := _newest(folder)):
        raise UserError(
            f"{folder}: a later attempt of this job has trained into it since ({named(now)}), and this one is over. "
            f"Where that was another job of the same number, remove {folder / ATTEMPT}"
        )
    handle.truncate(0)
    handle.write(json.dumps(me) + "\n")
    handle.flush()
    os.fsync(handle.fileno())  # for whoever finds it locked from another node
    _name(folder, me)
    return True


def _take_over(folder: Path, handle: TextIO, holder: dict[str, Any], me: dict[str, Any], wait_s: float) -> None:
    """Tell `holder` to leave, and put a lock that nobody holds at the place of one that it does not give up."""
    _name(folder, me)
    deadline = time.monotonic() + wait_s
    while not (left := _locks(handle)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    log.warning(
        f"{folder}: taken over from an earlier attempt of this job ({named(holder)}), which "
        + ("has left" if left else f"did not leave within {wait_s:.0f} s; whatever lives of it writes no more")
    )
    if not left and _read(handle) == holder:
        draft = folder / f".{LOCK}.{me['id']}.tmp"
        draft.touch()
        draft.replace(folder / LOCK)


def _name(folder: Path, me: dict[str, Any]) -> None:
    write_text(folder / ATTEMPT, json.dumps(me) + "\n")


def _newest(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return _record((folder / ATTEMPT).read_text())
    return {}


def _locks(handle: TextIO) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        raise UserError(
            f"{handle.name}: the file system keeps no locks ({error.strerror}); have it mounted with them (Lustre: -o "
            "flock), or give the run a folder elsewhere and checkpoint.to there"
        ) from None
    return True


def _is_at(handle: TextIO, file: Path) -> bool:
    """Whether what was opened is still the file of that name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle.fileno()), file.stat())
    return False


def _read(handle: TextIO) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        handle.seek(0)
        return _record(handle.read())
    return {}


def _record(text: str) -> dict[str, Any]:
    found = json.loads(text)
    return found if isinstance(found, dict) else {}


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    said = f"another process is training into {folder}"
    if not holder:
        return f"{said}; wait for it or stop it"
    host, pid = holder.get("host"), holder.get("pid")
    stop, look = f"kill {pid}", f"ps -p {pid}"
    if job := holder.get("job"):
        stop, look = f"scancel {job}", f"squeue -j {job}"
    where = "" if job else f" on {host}"
    return (
        f"{said}: {named(holder)}. Wait for it or stop it (`{stop}`{where}). Where it is gone (`{look}`{where}) and "
        f"only the file system still holds its lock, remove {folder / LOCK}"
    )
