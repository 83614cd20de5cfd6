"""From a recipe to a report: stages as jobs that wait for each other, or one after another on this machine.

Nothing stays behind that watches: each job marks its own end (`slurm.marks`), Slurm holds what stands on it, and the
same command looks at the marks and the queue and sends what is neither done nor under way.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import submitit

from pretrain.errors import UserError
from pretrain.recipe import Recipe
from slurm import ledger
from slurm.here import run_here, tail
from slurm.logfile import log_file
from slurm.marks import Marks, named, trained
from slurm.profile import Profile
from slurm.snapshot import snapshot
from slurm.stage_job import StageJob
from slurm.stages import TRAIN, Room, Stage
from slurm.submit import submit, training
from slurm.work import Cluster, Resources, Work, script, send


@dataclass(frozen=True)
class Pipeline:
    """stages: each behind those that it needs. parallel: elements of an array at once; None: all that Slurm has room
    for, one on this machine."""

    recipe: Recipe
    out: Path
    stages: Sequence[Stage]
    rooms: Mapping[Room, tuple[Resources, Profile]]
    parallel: int | None = None

    @property
    def folder(self) -> Path:
        """Of logs, submitit's files, and what was sent."""
        return self.out / "slurm"

    @property
    def run(self) -> Path:
        return self.recipe.output.absolute()

    @property
    def marks(self) -> Marks:
        return Marks(self.out / "stages", self.run)

    @cached_property
    def code(self) -> Path:
        return self._snapshot(write=True)

    def _snapshot(self, *, write: bool) -> Path:
        return snapshot(self.folder, [name for name in self.recipe.objectives if "." in name], write=write)

    def left(self) -> dict[str, list[int]]:
        """Of each stage the parts that are not done, or stand on what is to be done again."""
        found: dict[str, list[int]] = {}
        for stage in self.stages:
            if stage.name == TRAIN:
                found[TRAIN] = [] if trained(self.recipe) else [0]
            elif any(found[need] for need in stage.needs):
                found[stage.name] = list(range(stage.parts))
            else:
                found[stage.name] = self.marks.left(stage, self.needs(stage))
        return found

    def needs(self, stage: Stage) -> list[Stage]:
        return [need for need in self.stages if need.name in stage.needs]

    def work(self, stage: Stage, parts: Sequence[int], after: Sequence[str] = (), *, write: bool = True) -> Work:
        """The job that does `parts` of `stage`. write: put the recipe and the code where it finds them."""
        resources, profile = self.rooms[stage.room]
        if stage.name == TRAIN:
            return training(self.recipe, resources, profile, after=tuple(after), write=write)
        tasks = [StageJob(stage, part, self.needs(stage), self.marks, profile.max_restarts) for part in parts]
        code = self.code if write else self._snapshot(write=False)
        return Work(
            f"{self.recipe.name}-{stage.name}", self.folder, tasks, resources, profile, code, str(self.out),
            tuple(after), self.parallel,
        )  # fmt: skip

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within: no other command sends or runs stages of this folder."""
        self.marks.folder.mkdir(parents=True, exist_ok=True)
        with open(self.marks.folder / "LOCK", "a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another command is at work on the pipeline in {self.out}: let it end first") from None
            yield


def send_parts(work: Work, stage: Stage, parts: Sequence[int], cluster: Cluster) -> submitit.Job[Any]:
    """Send the job of these parts of a stage, and note it."""
    job = send(work, cluster)[0]
    ledger.note(work, stage.name, parts, ledger.array(job.job_id), cluster, stage.command)
    return job


def scripts(pipeline: Pipeline) -> Iterator[str]:
    """What sbatch would get, with JOB_OF_stage for the ids that Slurm will give."""
    left = pipeline.left()
    for stage in pipeline.stages:
        if not left[stage.name]:
            yield f"# ---- {stage.name}: done\n"
            continue
        after = [f"JOB_OF_{need}" for need in stage.needs if left[need]]
        work = pipeline.work(stage, left[stage.name], after, write=False)
        yield f"# ---- {stage.name}: polyview {' '.join(stage.argv)}\n{script(work)}"


def run_left(pipeline: Pipeline, say: Callable[[str], None]) -> None:
    """Run what is not done, stage after stage, until one fails.

    Raises:
        UserError: it failed; with its exit code and the end of its log.
    """
    with pipeline.held():
        for stage in pipeline.stages:
            parts = pipeline.left()[stage.name]
            if not parts:
                say(f"{stage.name}: done before")
                continue
            began = time.monotonic()
            on = pipeline.marks.stamps(pipeline.needs(stage))
            shown = f" ({len(parts)} of {stage.parts} parts)" if stage.parts > 1 else ""
            say(f"{stage.name}{shown}: polyview {' '.join(named(word, on) for word in stage.argv)}")
            _run_parts(pipeline, stage, parts)
            say(f"{stage.name}: done in {time.monotonic() - began:.0f} s")


def _run_parts(pipeline: Pipeline, stage: Stage, parts: Sequence[int]) -> None:
    works = [pipeline.work(stage, [part]) for part in parts]
    part_of = dict(zip(map(id, works), parts))

    def start(work: Work) -> submitit.Job[Any]:
        if stage.name == TRAIN:
            return submit(work, "local")
        return send_parts(work, stage, [part_of[id(work)]], "local")

    for work, job, code in run_here(works, start, pipeline.parallel or 1):
        if code:
            log = log_file(work.folder, job.job_id)
            raise UserError(
                f"{stage.name} ended with exit code {code}; the same command goes on from there. The end of {log}:\n"
                f"{tail(log)}",
                exit_code=code,
            )


def in_room(resources: Resources, profile: Profile, **changes: Any) -> tuple[Resources, Profile]:
    """A room like another, with changes to its profile; None is none."""
    said = {name: value for name, value in changes.items() if value is not None}
    changed = Profile.model_validate(profile.model_dump() | said)
    return replace(resources, cpus_per_rank=changed.cpus_per_rank, minutes=changed.minutes), changed
