"""A recipe as a job: one task a rank, the world taken from Slurm."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import submitit

from pretrain.errors import UserError
from pretrain.recipe import Recipe, check_split, dump_recipe
from pretrain.run import RunFolder
from slurm import queue, records
from slurm.profile import EARLY_S, Profile
from slurm.snapshot import snapshot
from slurm.train_job import TrainJob
from slurm.work import Cluster, Resources, Work, send


def training(
    recipe: Recipe, resources: Resources, profile: Profile, *, after: tuple[str, ...] = (), write: bool = True
) -> Work:
    """The job that trains `recipe`, checked. write: put its recipe and code into RUN/slurm.

    Raises:
        UserError: as `train_job`.
    """
    job = train_job(recipe, resources, profile, write=write)
    code = snapshot(job.folder, [name for name in recipe.objectives if "." in name], write=write)
    return Work(recipe.name, job.folder, [job], resources, profile, code, str(job.run), after)


def train_job(recipe: Recipe, resources: Resources, profile: Profile, *, write: bool = True) -> TrainJob:
    """What every rank does. write: put its recipe into RUN/slurm.

    Raises:
        UserError: the time limit leaves no time, the world does not fit the recipe, or its folder holds another run
            (with what differs).
    """
    if 60 * resources.minutes <= profile.signal_s + EARLY_S:
        raise UserError(
            f"a time limit of {resources.minutes} minutes, and a warning {profile.signal_s} s before it (the profile's "
            f"signal_s; Slurm may be {EARLY_S} s early): no time is left to train"
        )
    for world in resources.worlds:
        _check_world(recipe, world)
    run = Path(os.path.realpath(recipe.output))
    RunFolder(run).check(recipe)
    folder = run / "slurm"
    text = dump_recipe(recipe)
    # named by what it holds: a queued job never reads the recipe of a later submission
    recipe_file = folder / f"recipe-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    if write:
        recipe_file.parent.mkdir(parents=True, exist_ok=True)
        recipe_file.write_text(text)
    return TrainJob(str(recipe_file), str(run), profile.max_restarts)


def submit(work: Work, cluster: Cluster) -> submitit.Job[Any]:
    """Send a training job and note it with the run.

    Raises:
        UserError: a job of this run waits or runs already, or Slurm refuses this one.
    """
    if cluster == "slurm" and queue.here():
        for job in queue.of_run(Path(work.about), queue.queued()):
            if job.state == "COMPLETING":
                raise UserError(f"job {job.job} of {work.about} is about to end: the same command again in a moment")
            raise UserError(
                f"job {job.job} of {work.about} is in the queue already ({job.state}); see `python -m slurm status "
                f"{work.about}`, end it with `python -m slurm cancel {work.about} --save-first`"
            )
    (sent,) = send(work, cluster)
    asked = work.resources
    (task,) = work.tasks
    records.append(
        work.folder, "submitted", job=sent.job_id, name=work.name, nodes=asked.nodes, most_nodes=asked.most_nodes,
        ranks_per_node=asked.ranks_per_node, recipe=Path(getattr(task, "recipe_file", "")).name, cluster=cluster,
        code=work.code.name, after=list(work.after),
        profile=work.profile.model_dump(mode="json", exclude_defaults=True), cwd=os.getcwd(),
    )  # fmt: skip
    return sent


def _check_world(recipe: Recipe, world: int) -> None:
    if world < 1:
        raise UserError("--nodes x --ranks-per-node is no rank at all")
    if recipe.world not in (None, world):
        raise UserError(
            f"the recipe needs world {recipe.world}; --nodes x --ranks-per-node is {world}. Give world={world} to have "
            "it trained on so many ranks: the global batches stay the same"
        )
    try:
        check_split(recipe.global_batch, world, recipe.accumulation)
    except ValueError as error:
        raise UserError(str(error)) from None
