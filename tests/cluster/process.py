"""A cluster's daemons, each with a file that tells which process it is.

A pid alone may be a stranger's by the time it is signalled, so the file tells of the start time too, and signals go by
a descriptor that stands for that process and no other.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PATH = f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"
"""Daemons are in sbin, which a user's PATH often leaves out."""
_TOLD = re.compile(r"(SLURM|SBATCH|SRUN|SALLOC|SCANCEL|SQUEUE|SINFO|SACCT)_")
"""Variables that a job, or a user's habits, tell Slurm's clients."""


@dataclass(frozen=True)
class Process:
    """A process by its pid and the clock tick it was started at, which together name it for good."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid, _stat(pid)[1])

    @classmethod
    def read(cls, file: Path) -> Process | None:
        """The one that `file` tells of, running or not."""
        with suppress(FileNotFoundError):
            return cls(*map(int, file.read_text().split()))
        return None

    def running(self) -> bool:
        return self._state() not in ("", "Z")

    def end(self, number: signal.Signals = signal.SIGKILL, seconds: float = 20) -> None:
        """Signal it and wait for its end; by SIGKILL where `seconds` were not enough."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if not self._state():  # asked after the descriptor was opened: that stands for a stranger
                return
            for how in (number, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, how)
                if select.select([fd], [], [], seconds)[0]:
                    break
            with suppress(ChildProcessError):  # started by another process than this
                os.waitpid(self.pid, os.WNOHANG)
        finally:
            os.close(fd)

    def _state(self) -> str:
        """As the kernel has it, Z for one that has ended and is not yet buried; empty when it is gone."""
        with suppress(OSError):
            state, started = _stat(self.pid)
            return state if started == self.started else ""
        return ""


def environment(**added: str) -> dict[str, str]:
    """This process's, but for what would tell Slurm of another cluster or job, with `added`."""
    return {k: v for k, v in os.environ.items() if not _TOLD.match(k)} | {"PATH": PATH} | added


def spawn(argv: Sequence[str], log: Path, env: Mapping[str, str], *, bound: bool, stdin: int | None = None) -> Process:
    """Start `argv` in a session of its own, its output added to `log`.

    Args:
        bound: it is killed when the thread that called this ends, by whatever cause: nobody else would end it.
        stdin: descriptor it reads from; else it reads nothing.
    """
    command = ["setpriv", "--pdeathsig=KILL", *argv] if bound else list(argv)
    actions: list[tuple] = [
        (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    if stdin is None:
        actions.append((os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0))
    else:
        actions.append((os.POSIX_SPAWN_DUP2, stdin, 0))
    return Process.of(os.posix_spawnp(command[0], command, env, file_actions=actions, setsid=True))


class Daemons:
    """The daemons of the cluster in `folder`: run/NAME.pid tells which process each is, log/NAME.out what it said."""

    def __init__(self, folder: Path, *, bound: bool) -> None:
        self.folder = folder
        self.bound = bound

    def running(self, name: str) -> bool:
        process = Process.read(self._file(name))
        return process is not None and process.running()

    @property
    def env(self) -> dict[str, str]:
        """What a daemon or a client of this cluster has to be told by its environment."""
        return {"SLURM_CONF": str(self.folder / "etc/slurm.conf")}

    def start(self, name: str, *argv: object, stdin: int | None = None) -> Process:
        log = self.folder / "log" / f"{name}.out"
        words = [str(word) for word in argv]
        process = spawn(words, log, environment(**self.env), bound=self.bound, stdin=stdin)
        self.keep(name, process)
        return process

    def keep(self, name: str, process: Process) -> None:
        self._file(name).write_text(f"{process.pid} {process.started}\n")

    def end(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        if process := Process.read(self._file(name)):
            process.end(number)
        self._file(name).unlink(missing_ok=True)

    def end_all(self) -> None:
        for file in sorted((self.folder / "run").glob("*.pid")):
            self.end(file.stem)

    def wait_for(self, predicate: Callable[[], object], seconds: float, what: str) -> None:
        """Poll until `predicate` holds.

        Raises:
            TimeoutError: it did not within `seconds`; with the last lines of every log.
        """
        end = time.monotonic() + seconds
        while not predicate():
            if time.monotonic() > end:
                raise TimeoutError(f"waited {seconds:g} s for {what}\n{self._logs()}")
            time.sleep(0.05)

    def ask(self, *argv: object) -> str | None:
        """What a client prints; None where it fails, as it does while the daemon it asks is not there yet."""
        words = [str(word) for word in argv]
        env = environment(**self.env)
        try:
            return subprocess.run(words, capture_output=True, text=True, env=env, check=True, timeout=20).stdout
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return None

    def _file(self, name: str) -> Path:
        return self.folder / "run" / f"{name}.pid"

    def _logs(self) -> str:
        logs = sorted((self.folder / "log").glob("*"))
        tails = ("\n".join(log.read_text(errors="replace").splitlines()[-8:]) for log in logs)
        return "\n".join(f"== {log}\n{tail}" for log, tail in zip(logs, tails) if tail)


def children(pid: int) -> list[int]:
    with suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _stat(pid: int) -> tuple[str, int]:
    """State and start time; the command's name before them, in brackets, may hold anything."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])
