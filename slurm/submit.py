"""A recipe as a submitit job: one task a rank, the world taken from Slurm."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from typing import Any

import submitit

from pretrain.errors import UserError
from pretrain.recipe import Recipe, check_split, dump_recipe


@dataclass(frozen=True)
class Resources:
    """What a job asks of the cluster."""

    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_rank: int = 4
    minutes: int = 60
    partition: str | None = None
    account: str | None = None

    @property
    def world(self) -> int:
        return self.nodes * self.ranks_per_node


class TrainJob:
    """What every task runs; submitit keeps it with the job, so that a requeued one resumes."""

    def __init__(self, recipe_file: str) -> None:
        self.recipe_file = recipe_file

    def __call__(self) -> None:
        from pretrain.__main__ import main

        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        if code := main(["train", self.recipe_file]):
            raise RuntimeError(f"training ended with exit code {code}: why stands above")  # so the job counts as failed

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit before the time limit: the same job again, which resumes."""
        return submitit.helpers.DelayedSubmission(self)


def submit(recipe: Recipe, resources: Resources, *, cluster: str) -> submitit.Job[Any]:
    """Submit to Slurm (`cluster="slurm"`) or run the same job here (`"local"`); logs go to RUN/slurm/.

    Raises:
        UserError: the world does not fit the recipe, or there is no Slurm here.
    """
    if resources.world < 1:
        raise UserError(f"--nodes {resources.nodes} x --ranks-per-node {resources.ranks_per_node} is no rank at all")
    if recipe.world not in (None, resources.world):
        raise UserError(f"the recipe needs world {recipe.world}; --nodes x --ranks-per-node is {resources.world}")
    try:
        check_split(recipe.global_batch, resources.world, recipe.accumulation)
    except ValueError as error:
        raise UserError(str(error)) from None
    if cluster == "local" and resources.nodes > 1:
        raise UserError(f"--local is this machine alone: --nodes 1 --ranks-per-node {resources.world}")
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError("no sbatch on this machine: log in to the cluster, or use --local")
    folder = recipe.output.absolute() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    text = dump_recipe(recipe)
    # named by what it holds: a queued job never reads the recipe of a later submission
    recipe_file = folder / f"recipe-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    recipe_file.write_text(text)
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    executor.update_parameters(
        name=recipe.name,
        nodes=resources.nodes,
        tasks_per_node=resources.ranks_per_node,
        gpus_per_node=resources.gpus_per_node,
        cpus_per_task=resources.cpus_per_rank,
        timeout_min=resources.minutes,
    )
    if cluster == "slurm":
        wanted = {"partition": resources.partition, "account": resources.account}
        executor.update_parameters(**{f"slurm_{k}": v for k, v in wanted.items() if v is not None})
    return executor.submit(TrainJob(str(recipe_file)))
