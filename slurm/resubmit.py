"""A run is submitted again: as its last job was, or with other nodes; each goes on from the newest save.

What the last job asked for is in RUN/slurm/jobs.jsonl: nodes, ranks, the site's profile with all flags, the recipe, and
the folder that paths in the recipe start from.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.recipe import Recipe, load_recipe
from slurm import queue, records
from slurm.cancel import cancel, save_and_cancel
from slurm.options import resources_of, site
from slurm.profile import Profile, load_profile
from slurm.queue import Queued
from slurm.reasons import held, why
from slurm.submit import submit, training
from slurm.work import Resources

CHANGES = (
    "nodes", "exclude", "profile", "ranks_per_node", "gpus_per_node", "cpus_per_rank", "minutes", "partition",
    "account", "qos", "max_restarts",
)  # fmt: skip
"""Flags that make it another job."""
POLL_S = 1.0


def requeue(run: Path, flags: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Have `run` go on: {"job", "how": "saves and requeues" | "submitted", …}.

    run: absolute. flags: those of `slurm.options`, None where not given, and `limit_s`. tell: given the progress.

    Raises:
        UserError: it waits for its turn already, a save did not come, or what is asked for does not fit the recipe.
    """
    last = _last(run)
    recipe, resources, profile = asked(run, last, flags)
    with _within(last.get("cwd")):
        training(recipe, resources, profile, write=False)  # refused before anything is ended
    jobs = queue.of_run(run, queue.queued())
    if not any(getattr(flags, change) is not None for change in CHANGES):
        for job in jobs:
            if job.state == "RUNNING":
                queue.ask("scancel", "--signal=USR2", job.job)
                return {"job": job.job, "how": "saves and requeues"}
            if job.waits and not held(job):
                raise UserError(f"job {job.job} of {run} waits for its turn already: {why(job)}")
    _clear(run, jobs, flags.limit_s, tell)
    with _within(last.get("cwd")):
        work = training(recipe, resources, profile)
        sent = submit(work, "slurm")
    return {
        "job": sent.job_id, "how": "submitted", "nodes": resources.nodes_asked,
        "ranks_per_node": resources.ranks_per_node, "exclude": profile.exclude, "logs": str(work.folder),
    }  # fmt: skip


def asked(run: Path, last: dict[str, Any], flags: argparse.Namespace) -> tuple[Recipe, Resources, Profile]:
    """What the next job of `run` trains, on what, where: as the last one, but for `flags`."""
    recorded = Profile.model_validate(last.get("profile", {}))
    profile = site(flags, load_profile(flags.profile) if flags.profile else recorded)
    flags = argparse.Namespace(**vars(flags))
    if flags.nodes is None:
        most = last.get("most_nodes")
        flags.nodes = f"{last.get('nodes', 1)}-{most}" if most else str(last.get("nodes", 1))
    if flags.ranks_per_node is None and not (flags.profile or flags.gpus_per_node):
        flags.ranks_per_node = last.get("ranks_per_node")
    recipe = load_recipe(_recipe_file(run, last)).model_copy(update={"output": run})
    resources = resources_of(flags, profile, recipe.world)
    if recipe.world is not None:
        worlds = resources.worlds
        recipe = recipe.model_copy(update={"world": worlds[0] if len(worlds) == 1 else None})
    return recipe, resources, profile


def _recipe_file(run: Path, last: dict[str, Any]) -> Path:
    """What was submitted last; of a run that began without Slurm, its own."""
    submitted = run / "slurm" / (last.get("recipe") or "none")
    if submitted.is_file():
        return submitted
    if (run / "recipe.yaml").is_file():
        return run / "recipe.yaml"
    kept = sorted((run / "slurm").glob("recipe-*.yaml"), key=lambda file: file.stat().st_mtime)
    if not kept:
        raise UserError(f"{run} is not a run: it has no recipe.yaml, and no job of it was submitted")
    return kept[-1]


def _last(run: Path) -> dict[str, Any]:
    sent = records.submissions(run / "slurm")
    return sent[-1] if sent else {}


def _clear(run: Path, jobs: list[Queued], limit_s: float, tell: Callable[[str], None]) -> None:
    """End the jobs of `run`, saved, and wait until they have left the queue."""
    waits = [job for job in jobs if job.waits]
    save_and_cancel([job for job in jobs if job.state == "RUNNING"], limit_s, tell)
    for job in waits:
        cancel(job)
    patience = time.monotonic() + limit_s
    while left := queue.of_run(run, queue.queued()) if jobs else []:
        if time.monotonic() > patience:
            raise UserError(f"job {left[0].job} of {run} does not leave the queue ({left[0].state}); try again later")
        time.sleep(POLL_S)


@contextlib.contextmanager
def _within(folder: str | None) -> Iterator[None]:
    """Within: the working folder of the last submission, which paths in the recipe start from."""
    try:
        with contextlib.chdir(folder or "."):
            yield
    except FileNotFoundError:
        if folder is None or Path(folder).is_dir():
            raise
        raise UserError(
            f"the run was submitted from {folder}, which is gone; paths in its recipe start there"
        ) from None
