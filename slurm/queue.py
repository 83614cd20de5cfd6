"""What Slurm says of jobs: one question for all of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import UserError
from slurm import records

ANSWER_S = 60
ACCOUNTS_S = 10
"""The accounting is asked for what is good to know only."""
ABOUT = "polyview:"
"""Begins the comment of our jobs; the folder that a job belongs to follows."""

_FIELDS = ("%i", "%T", "%r", "%D", "%N", "%M", "%l", "%S", "%j", "%k")


@dataclass(frozen=True)
class Queued:
    """A job that waits or runs."""

    job: str
    """`42`, an array's `42_7`."""
    state: str
    reason: str
    """Why it waits: Priority, Resources, Dependency, …; `slurm.reasons` puts it into words."""
    nodes: int
    where: str
    elapsed: str
    limit: str
    starts: str
    """When it began, or is expected to; N/A."""
    name: str
    about: str
    """The folder that it belongs to, "" for jobs that are not ours."""

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "REQUEUE_FED")


def here() -> bool:
    """Whether this machine can ask Slurm."""
    return shutil.which("squeue") is not None


def queued() -> list[Queued]:
    """This user's jobs that wait, run or are about to end; elements of arrays one by one.

    Raises:
        UserError: the controller does not answer.
    """
    return parse(ask("squeue", "--me", "--array", "--noheader", "--format", "|".join(_FIELDS)))


def parse(text: str) -> list[Queued]:
    """The jobs in squeue's answer."""
    found = []
    for line in text.splitlines():
        job, state, reason, nodes, where, elapsed, limit, starts, rest = line.split("|", len(_FIELDS) - 2)
        name, ours, about = rest.partition(f"|{ABOUT}")  # names and folders may hold anything
        if not ours:
            name = rest.rpartition("|")[0]
        found.append(Queued(job, state, reason, int(nodes), where, elapsed, limit, starts, name, about))
    return found


def belonging(what: str | Path, jobs: Iterable[Queued]) -> list[Queued]:
    """Those of `jobs` that `what` means: a job's id (of an array: all its elements), or a folder with what is below."""
    asked = str(what)
    if asked.replace("_", "").isdigit():
        return [job for job in jobs if asked in (job.job, job.job.partition("_")[0])]
    jobs, below = list(jobs), os.path.join(os.path.realpath(what), "")
    found = [job for job in jobs if job.about and f"{os.path.realpath(job.about)}/".startswith(below)]
    return found + [job for job in of_run(Path(what), jobs) if job not in found]


def of_run(run: Path, jobs: Iterable[Queued]) -> list[Queued]:
    """Those of `jobs` that train `run`."""
    return Jobs(jobs).of(run)


class Jobs:
    """Jobs in the queue, found by the folder that they belong to."""

    def __init__(self, jobs: Iterable[Queued]) -> None:
        self._by_folder: dict[str, list[Queued]] = {}
        for job in {job.job: job for job in jobs if job.about}.values():
            self._by_folder.setdefault(os.path.realpath(job.about), []).append(job)

    def about(self, folder: Path) -> list[Queued]:
        """Those about `folder` itself."""
        return list(self._by_folder.get(os.path.realpath(folder), ()))

    def of(self, run: Path) -> list[Queued]:
        """Those that train `run`: about it, or about a folder of runs (a sweep's array) and named by its records."""
        parents = Path(os.path.realpath(run)).parents
        above = [job for parent in parents for job in self._by_folder.get(str(parent), ())]
        known = _known(run / "slurm") if above else ()
        return self.about(run) + [job for job in above if job.job in known]


def _known(folder: Path) -> set[str]:
    """Jobs of Slurm's that the records of a run name."""
    lines = records.read(folder)
    here = {str(line["job"]) for line in lines if line.get("cluster") == "local"}
    return {str(line.get("job")) for line in lines} - here


def ended(jobs: Sequence[str]) -> dict[str, str]:
    """States of jobs that have left the queue, by the accounting (which may lag by seconds); those it does not know are
    left out, all of them where a site keeps no accounts."""
    return {job: states[-1] for job, states in endings(jobs).items()}


def endings(jobs: Sequence[str]) -> dict[str, list[str]]:
    """As `ended`, with the states of all attempts of a job, the first one first."""
    if not jobs or shutil.which("sacct") is None:
        return {}
    argv = ["sacct", "--duplicates", "-n", "-X", "-P", "-o", "JobID,State", "-j", ",".join(jobs)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=ACCOUNTS_S)
    except subprocess.TimeoutExpired:
        return {}
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        job, bar, state = line.partition("|")
        if bar and state:
            found.setdefault(job, []).append(state.split()[0])  # "CANCELLED by 1000"
    return found


def ask(*argv: str) -> str:
    """The answer of one of Slurm's commands.

    Raises:
        UserError: there is no such command here, or it fails.
    """
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=ANSWER_S)
    except FileNotFoundError:
        raise UserError(f"no {argv[0]} on this machine: log in to the cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{argv[0]} gave no answer for {ANSWER_S} s: is the controller up? (scontrol ping)") from None
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"{' '.join(argv[:3])}: {said}")
    return done.stdout
