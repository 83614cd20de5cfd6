"""A job before it is sent: what it does, what it asks for, and the script that Slurm gets.

One form for training, a stage of a pipeline and an array, on the cluster and on this machine alike; submitit writes the
script, sends it and starts the tasks.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import submitit
from submitit.slurm.slurm import SlurmExecutor

from pretrain.errors import UserError
from slurm.profile import Profile

Cluster = Literal["slurm", "local"]
Task = Callable[[], Any]

NO_LIMIT_MIN = 60 * 24 * 365
"""On this machine nobody ends a job for its time."""

TIMEOUTS = 1_000_000
"""Of submitit, which takes every end within its first ten minutes for a time-out; how often is ours to count."""


@dataclass(frozen=True)
class Resources:
    """What a job asks of the cluster."""

    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_rank: int = 4
    minutes: int = 60
    most_nodes: int | None = None
    """More nodes than `nodes` are taken where they are free, up to so many."""

    @property
    def worlds(self) -> list[int]:
        """Ranks in all, for each number of nodes that it may get."""
        return [n * self.ranks_per_node for n in range(self.nodes, (self.most_nodes or self.nodes) + 1)]

    @property
    def nodes_asked(self) -> str:
        """As Slurm takes it."""
        return f"{self.nodes}-{self.most_nodes}" if self.most_nodes else str(self.nodes)


@dataclass(frozen=True)
class Work:
    """A job, or an array of them.

    name: in the queue. folder: its logs and submitit's files; shared by all nodes. tasks: what every rank calls; more
    than one makes an array. code: where Python looks first (`slurm.snapshot`). about: kept as the job's comment, so
    that the queue tells what a job belongs to. after: jobs that must have ended well. parallel: of an array, at once.
    """

    name: str
    folder: Path
    tasks: Sequence[Task]
    resources: Resources
    profile: Profile
    code: Path
    about: str
    after: tuple[str, ...] = ()
    parallel: int | None = None


def send(work: Work, cluster: Cluster) -> list[submitit.Job[Any]]:
    """Submit `work`, or start it on this machine; a job each task.

    Raises:
        UserError: there is no Slurm here, or it refuses the job.
    """
    if cluster == "local" and work.resources.nodes > 1:
        raise UserError(
            f"without Slurm there is this machine alone: --nodes 1 --ranks-per-node {work.resources.worlds[0]}"
        )
    if cluster == "slurm" and (missing := [c for c in ("sbatch", "srun") if shutil.which(c) is None]):
        raise UserError(f"no {' and no '.join(missing)} on this machine: log in to the cluster, or use --local")
    if "%" in str(work.folder.absolute()):
        raise UserError(f"{work.folder.absolute()}: Slurm takes % in the path of a log for its own; choose another")
    work.folder.mkdir(parents=True, exist_ok=True)
    executor = _local(work) if cluster == "local" else _slurm(work, SlurmExecutor)
    try:
        with _environment(outside_jobs() | (_variables(work) if cluster == "local" else {})):
            if len(work.tasks) == 1:
                return [executor.submit(work.tasks[0])]
            return executor.map_array(_call, work.tasks)
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"Slurm refuses {work.name}: {error}".strip()) from None


def script(work: Work) -> str:
    """The text that sbatch gets for `work`; needs no Slurm."""
    executor = _slurm(work, _Unsent)
    if len(work.tasks) > 1:
        executor.parameters["map_count"] = len(work.tasks)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def outside_jobs() -> dict[str, str]:
    """This process's environment without what a job that it may be in tells Slurm's commands: a job that is sent from
    within another would take that one's cores, memory and number of restarts for its own."""
    told = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")
    return {name: value for name, value in os.environ.items() if not name.startswith(told) or name == "SLURM_CONF"}


class _Unsent(SlurmExecutor):
    """Writes scripts where no Slurm is."""

    @classmethod
    def affinity(cls) -> int:
        return 0x7F


def _call(task: Task) -> Any:
    return task()


def _local(work: Work) -> submitit.LocalExecutor:
    executor = submitit.LocalExecutor(work.folder, max_num_timeout=TIMEOUTS)
    asked = work.resources
    gpus = _gpus_here()[: asked.gpus_per_node or None]
    executor.update_parameters(
        tasks_per_node=asked.ranks_per_node, gpus_per_node=len(gpus), visible_gpus=gpus, timeout_min=NO_LIMIT_MIN
    )
    return executor


def _gpus_here() -> list[int]:
    """Numbers of the GPUs that this process may use, found without waking them."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [int(number) for number in said.split(",") if number.isdigit()]
    return sorted(int(file.name.removeprefix("nvidia")) for file in Path("/dev").glob("nvidia[0-9]*"))


def _slurm(work: Work, kind: type[SlurmExecutor]) -> SlurmExecutor:
    profile, asked = work.profile, work.resources
    seen = (Path.cwd(), Path(work.about), work.folder.absolute(), work.code.absolute())
    python = profile.interpreter(seen)
    executor = kind(work.folder, max_num_timeout=TIMEOUTS, python=python)
    own = {
        key: getattr(profile, key)
        for key in ("partition", "account", "qos", "constraint", "exclude", "mem")
        if getattr(profile, key) is not None
    }
    if work.parallel:
        own["array_parallelism"] = work.parallel
    if work.after:
        own["dependency"] = f"afterok:{':'.join(work.after)}"
    more: dict[str, Any] = {"requeue": True, "comment": f"polyview:{work.about}"}
    if work.after:
        more["kill-on-invalid-dep"] = "yes"  # else it waits for ever for what has failed
    if asked.most_nodes:
        more["nodes"] = asked.nodes_asked
    if profile.reservation:
        more["reservation"] = profile.reservation
    executor.update_parameters(
        job_name=work.name,
        nodes=asked.nodes,
        ntasks_per_node=asked.ranks_per_node,
        cpus_per_task=asked.cpus_per_rank,
        **({"gpus_per_node": asked.gpus_per_node} if asked.gpus_per_node else {}),
        time=asked.minutes,
        signal_delay_s=profile.signal_s,
        setup=[*profile.setup, *_exports(work)],
        teardown=[_last_line(work)],
        srun_args=profile.srun_flags(asked.cpus_per_rank, seen),
        additional_parameters=more | profile.sbatch,
        wckey=profile.wckey,  # submitit's own is refused where keys are checked
        **own,
    )
    return executor


def _variables(work: Work) -> dict[str, str]:
    # the code of this job before any other, and never what lies in the working folder
    return {"PYTHONPATH": str(work.code.absolute()), "PYTHONSAFEPATH": "1"} | work.profile.variables()


def _last_line(work: Work) -> str:
    """What is done behind the tasks, outside of containers; the job's exit code stays theirs."""
    python = work.profile.python or shlex.quote(sys.executable)
    comeback = f"{python} -m slurm.comeback {shlex.quote(str(work.folder.absolute()))}"
    return f"code=$?; [ $code = 0 ] || {comeback} $code; exit $code"


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Within: the environment that processes are started with."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _exports(work: Work) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in _variables(work).items()]
