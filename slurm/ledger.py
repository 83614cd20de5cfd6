"""Which job was last sent for what: the elements of arrays one by one, and those of them that are under way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm import queue, records
from slurm.work import Cluster, Work

ENDING_S = 60
"""Seconds that a job may take to leave the queue. One whose node is lost, and which comes back, takes longer."""

Element = tuple[str, int | str]
"""What an array does in all, and which of it an element does."""


@dataclass(frozen=True)
class Sent:
    """The job that an element was last sent as."""

    job: str
    after: tuple[str, ...]
    argv: tuple[str, ...]
    among: int
    """Elements of its array."""


def note(
    work: Work, what: str, elements: Sequence[int | str], job: str, cluster: Cluster, argv: Sequence[str] = ()
) -> None:
    """Write down that `work` was sent as `job`."""
    records.append(
        work.folder, "submitted", job=job, name=what, elements=list(elements), tasks=len(work.tasks),
        nodes=work.resources.nodes, ranks_per_node=work.resources.ranks_per_node, recipe="", after=list(work.after),
        argv=list(argv), cluster=cluster, code=work.code.name,
    )  # fmt: skip


def newest(folder: Path) -> dict[Element, Sent]:
    found: dict[Element, Sent] = {}
    for line in records.submissions(folder):
        elements = line.get("elements", ())
        for i, element in enumerate(elements):
            job = f"{line['job']}_{i}" if len(elements) > 1 else str(line["job"])
            found[line["name"], element] = Sent(job, tuple(line["after"]), tuple(line["argv"]), len(elements))
    return found


def array(job: str) -> str:
    """The array that an element's job belongs to."""
    return job.partition("_")[0]


def settled(mine: Callable[[queue.Jobs], Iterable[queue.Queued]]) -> queue.Jobs:
    """The queue, once those of `mine` that are about to end have left it. One that does not is under way: it may be
    about to come back."""
    patience = time.monotonic() + ENDING_S
    while True:
        jobs = queue.Jobs(queue.queued())
        if time.monotonic() > patience or not any(job.state == "COMPLETING" for job in mine(jobs)):
            return jobs
        time.sleep(1)


def how_ended(folder: Path) -> dict[str, str]:
    """How the last attempt of each job in `folder` ended."""
    return {a.job: a.how or ("cut off" if a.ended is None else "") for a in records.attempts(folder)}
