"""How runs stand: what the queue says of their jobs, put beside what their folders tell.

Of a folder only small files and the end of the log are read; Slurm is asked at most twice, for all runs together.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.exit_codes import LOST, TABLE
from pretrain.telemetry.alive import FOLDER, LEAST_S, SILENT, alive
from pretrain.telemetry.progress import duration
from slurm import queue, records, saves, tail
from slurm.queue import Jobs, Queued
from slurm.reasons import why

STANDS_S = 300
"""Seconds that rank 0 may stand at one place before the list of runs tells of it."""
_MEANING = {int(m[1]): m[2].strip() for m in re.finditer(r"^  (\d+) +([^:;,\n]+)", TABLE, re.MULTILINE)}


@dataclass(frozen=True)
class Seen:
    """What the files of a run tell, and its jobs in the queue."""

    run: Path
    jobs: list[Queued]
    tail: tail.Tail
    starts: list[dict[str, Any]]
    """RUN/run.json."""
    tried: list[records.Attempt]
    submitted: dict[str, Any] | None
    """The newest submission."""
    alive: bool
    """Whether it goes on without Slurm."""

    @property
    def job(self) -> Queued | None:
        """The one that matters: it runs, or will be the first to."""
        return min(self.jobs, key=lambda job: job.waits, default=None)

    @property
    def logs(self) -> Path:
        """Where its newest job's are: an array has them together."""
        return Path((self.submitted or {}).get("logs") or self.run / "slurm")

    @property
    def goes_on(self) -> bool:
        return self.alive or any(not job.waits for job in self.jobs)

    @property
    def unexplained(self) -> str | None:
        """The job whose end no record tells, and which is not in the queue: the accounting may know more."""
        newest = str(self.submitted["job"]) if self.submitted else None
        known = any(attempt.job == newest and attempt.how for attempt in self.tried[-1:])
        return None if self.jobs or self.alive or known else newest


@dataclass(frozen=True)
class Status:
    """A line of the table; as JSON it is what it says here."""

    run: str
    name: str
    state: str
    """Slurm's while it has a job; else done, stopped, failed, crashed, cut off, …"""
    detail: str
    """Where it runs, or why not."""
    jobs: list[str]
    step: int | None = None
    total_steps: int | None = None
    images_per_s: float | None = None
    eta_s: float | None = None
    loss: float | None = None
    saved: int | None = None
    restarts: int = 0
    """Times that it was taken up again."""
    last_end: str | None = None
    """How the attempt before the one that goes on ended, or the last one."""
    nodes: list[str] = field(default_factory=list)


def is_run(folder: Path) -> bool:
    """Whether it is the folder of a run, be it one that has not begun."""
    return (folder / "recipe.yaml").is_file() or any((folder / "slurm").glob("recipe-*.yaml"))


def runs_below(folder: Path, depth: int = 2) -> list[Path]:
    """Runs in `folder`, or in folders in it, by name."""
    found: list[Path] = []
    with suppress(OSError):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_dir() and is_run(path := Path(entry.path)):
                found.append(path)
            elif entry.is_dir() and depth > 1:
                found += runs_below(Path(entry.path), depth - 1)
    return found


def find(asked: Sequence[Path], jobs: Iterable[Queued]) -> list[Path]:
    """The runs meant by `asked`: runs, folders of them; none: those under ./runs and those that `jobs` belong to.

    Raises:
        UserError: a folder holds no run, and no job belongs to it.
    """
    jobs, found = list(jobs), []
    for folder in asked:
        below = [folder] if is_run(folder) else runs_below(folder)
        if not below and not queue.belonging(folder, jobs):
            raise UserError(f"{folder}: no run is there (recipe.yaml), and no job in the queue belongs to it")
        found += below
    if not asked:
        found = runs_below(Path("runs"))
        found += [Path(job.about) for job in jobs if job.about and is_run(Path(job.about))]
    return list({os.path.realpath(run): run for run in reversed(found)}.values())[::-1]


def look(run: Path, jobs: Jobs) -> Seen:
    """Read what is known of `run`."""
    folder, starts = run / "slurm", _starts(run)
    sent, tried = records.submissions(folder), records.attempts(folder)
    own = jobs.of(run)
    over = not starts or "ended" in starts[-1]
    goes_on = not own and not over and alive(run)
    return Seen(run, own, tail.read(run), starts, tried, sent[-1] if sent else None, goes_on)


def statuses(runs: Sequence[Path], jobs: Sequence[Queued]) -> list[Status]:
    """A line each for `runs`, and for those of `jobs` of ours that are none of theirs (a stage of a pipeline)."""
    queued = Jobs(jobs)
    seen = [look(run, queued) for run in runs]
    theirs = {job.job for one in seen for job in one.jobs}
    others: dict[tuple[str, str, str, str], list[Queued]] = {}
    for job in jobs:
        if job.about and job.job not in theirs:
            others.setdefault((job.about, job.name, job.state, job.reason), []).append(job)
    accounts = queue.endings([unknown for one in seen if (unknown := one.unexplained)])
    return [status(one, accounts) for one in seen] + [_stage(group) for group in others.values()]


def status(seen: Seen, accounts: dict[str, list[str]]) -> Status:
    """How a run stands; accounts: states of jobs that have left the queue."""
    state, detail = _state(seen, accounts)
    end, job = seen.tail, seen.job
    return Status(
        run=_shown(seen.run),
        name=job.name if job else str((seen.submitted or {}).get("name") or seen.run.name),
        state=state,
        detail=detail,
        jobs=[job.job for job in seen.jobs],
        step=end.step,
        total_steps=end.total,
        images_per_s=end.images_per_s if seen.goes_on else None,
        eta_s=end.eta_s if seen.goes_on else None,
        loss=end.loss,
        saved=saves.step(seen.run, seen.starts, end),
        restarts=max(0, len(seen.starts) - 1),
        last_end=last_end(seen, accounts),
        nodes=seen.tried[-1].nodes if seen.tried and seen.goes_on else [],
    )


def last_end(seen: Seen, accounts: dict[str, list[str]]) -> str | None:
    """How the last attempt that is over ended; None: there is none."""
    tried = seen.tried[:-1] if seen.tried and seen.tried[-1].how is None and seen.goes_on else seen.tried
    if tried:
        return how(tried[-1], accounts)
    if seen.tried:
        return None
    starts = seen.starts[:-1] if seen.goes_on else seen.starts
    return str(starts[-1].get("ended", "crashed")) if starts else None


def how(attempt: records.Attempt, accounts: dict[str, list[str]]) -> str:
    """How an attempt that is over ended: with what its exit code means, or what the accounting says of it."""
    states = accounts.get(attempt.job, [])
    state = states[attempt.restart] if attempt.restart < len(states) else None
    code = re.fullmatch(r"failed: exit code (\d+)", attempt.how or "")
    meaning = _MEANING.get(int(code[1])) if code else None
    told = [meaning, state if unexplained(attempt) and state not in ("RUNNING", "PENDING", "FAILED") else None]
    words = "; ".join(filter(None, told))
    return (attempt.how or "cut off") + (f" ({words})" if words else "")


def unexplained(attempt: records.Attempt) -> bool:
    """Whether it did not end by itself: what did is not in its records."""
    return attempt.how in (None, f"failed: exit code {LOST}")


def _state(seen: Seen, accounts: dict[str, list[str]]) -> tuple[str, str]:
    job = seen.job
    if job is not None:
        if job.waits:
            return job.state, f"job {job.job}: {why(job)}"
        place = f"job {job.job} on {job.where or f'{job.nodes} nodes'}, {job.elapsed} of {job.limit}"
        return job.state, "; ".join(filter(None, (place, _first_rank(seen.run) if job.state == "RUNNING" else None)))
    if seen.alive:
        host = str(seen.starts[-1].get("host", "an unknown host"))
        return "RUNNING", "; ".join(filter(None, (f"on {host}, without Slurm", _first_rank(seen.run))))
    return _over(seen, accounts)


def _over(seen: Seen, accounts: dict[str, list[str]]) -> tuple[str, str]:
    """State and detail of a run that has no job and does not go on."""
    newest = seen.unexplained
    told = accounts.get(newest, [""])[-1] if newest else ""
    if newest and not any(attempt.job == newest for attempt in seen.tried):
        return "never began", f"job {newest}" + (f": {told} by the accounting" if told else " is not in the queue")
    if seen.tried and not _begun_since(seen):
        ended = seen.tried[-1].how
        word = "cut off" if ended is None else ended.partition(":")[0]
        detail = {"requeued": "and is not in the queue any more", "cut off": told and f"job {newest}: {told}"}
        return word, detail.get(word) or how(seen.tried[-1], accounts) * (word == "failed")
    if not seen.starts:
        return "not begun", ""
    ended = seen.starts[-1].get("ended")
    if ended is None:
        return "crashed", f"on {seen.starts[-1].get('host', 'an unknown host')}: killed, or an error"
    return str(ended), {"unevaluated": "trained to its end; its last evaluation could not be read"}.get(ended, "")


def _begun_since(seen: Seen) -> bool:
    """Whether it was started by hand after the last attempt of a job."""
    with suppress(IndexError, KeyError, TypeError, ValueError):
        newest = seen.starts[-1]
        begun = datetime.datetime.fromisoformat(newest["date"]).timestamp()
        return newest.get("slurm_job") is None and begun > (seen.tried[-1].ended or seen.tried[-1].began)
    return False


def _first_rank(run: Path) -> str | None:
    """What is wrong with rank 0 of a run that goes on, by its newest sign of life."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        sign = json.loads((run / FOLDER / "rank_00000.json").read_text())
        silent_s = time.time() - sign["time"]
        if silent_s > max(LEAST_S, SILENT * sign["every_s"]):
            return f"rank 0 gave no sign of life for {duration(silent_s)}"
        if sign["since"] > STANDS_S:
            return f"rank 0 stands in {sign['phase']} at step {sign['step']:,} for {duration(sign['since'])}"
    return None


def _stage(jobs: list[Queued]) -> Status:
    """A line for jobs of one name and state that belong to no run."""
    first = jobs[0]
    many = f"{len(jobs)} x " if len(jobs) > 1 else ""
    places = ",".join(dict.fromkeys(job.where for job in jobs if job.where))
    detail = f"job {first.job}: {why(first)}" if first.waits else f"job {first.job} on {places}, {first.elapsed}"
    return Status(_shown(Path(first.about)), first.name, first.state, many + detail, [job.job for job in jobs])


def _starts(run: Path) -> list[dict[str, Any]]:
    with suppress(OSError, ValueError):
        return [start for start in json.loads((run / "run.json").read_text()) if isinstance(start, dict)]
    return []


def _shown(run: Path) -> str:
    """From the working folder, where it is below that."""
    path, here = os.path.abspath(run), os.getcwd()
    return os.path.relpath(path, here) if path.startswith(f"{here}/") else path
