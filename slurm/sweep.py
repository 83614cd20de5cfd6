"""Every combination of some recipe values: a run each, all of them one job array."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import submitit
import yaml

from pretrain.errors import UserError
from pretrain.recipe import Recipe, load_recipe
from pretrain.telemetry.runlog import read_log
from slurm import ledger, queue, records
from slurm.here import run_here
from slurm.logfile import log_file
from slurm.marks import trained
from slurm.profile import Profile
from slurm.snapshot import snapshot
from slurm.submit import submit, train_job, training
from slurm.work import Resources, Work, send

WHAT = "train"
LONGEST = 120
"""Letters of a run's name; where its values need more, a hash stands for the rest."""


@dataclass(frozen=True)
class Trial:
    """One combination."""

    name: str
    """`optimizer.lr=0.001_objectives.clip=1.0`: the keys by alphabet, so that the order they are given in is no
    matter."""
    values: dict[str, str]
    """As they were given."""
    recipe: Recipe

    @property
    def run(self) -> Path:
        return self.recipe.output


def grid(words: Sequence[str]) -> dict[str, list[str]]:
    """`key=1,2` words as key -> values; a comma within brackets is part of a value.

    Raises:
        UserError: a word is no such thing, or a key comes twice.
    """
    found: dict[str, list[str]] = {}
    for word in words:
        key, equals, values = word.partition("=")
        split = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", values)]
        if not key or not equals or not all(split):
            raise UserError(f"--grid {word}: give key=value,value (for example optimizer.lr=1e-3,3e-4)")
        if key in found:
            raise UserError(f"--grid: {key} is there twice; give all of its values at once")
        found[key] = list(dict.fromkeys(split))
    return found


def trials(recipe: str, overrides: Sequence[str], asked: Mapping[str, Sequence[str]], out: Path) -> list[Trial]:
    """A trial each combination; its run is `out`/NAME.

    Raises:
        UserError: a combination is no recipe, or a value is written in two ways.
    """
    found = []
    for values in itertools.product(*asked.values()):
        given = dict(zip(asked, values))
        name = _name(given)
        loaded = load_recipe(recipe, [*overrides, *(f"{k}={v}" for k, v in given.items()), f"output={out / name}"])
        named = loaded.model_copy(update={"name": f"{loaded.name}_{name.replace('=', '-')}"})
        found.append(Trial(name, given, named))
    if len({trial.name for trial in found}) < len(found):
        raise UserError("--grid: a value is there twice, written in two ways (such as 1e-3 and 0.001)")
    return found


def _name(values: Mapping[str, str]) -> str:
    name = "_".join(f"{key}={_word(values[key])}" for key in sorted(values))
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}_{_hash(name)}"


def _word(value: str) -> str:
    """A value as part of a name: 1e-3 and 0.001 are one, and two that differ never have the same."""
    parsed = _parsed(value)
    value = str(parsed) if isinstance(parsed, int | float) else value
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", value)
    return plain if plain == value else f"{plain[:40]}-{_hash(value)}"


def _parsed(value: str) -> Any:
    """As a recipe takes it."""
    parsed = yaml.safe_load(value)
    if isinstance(parsed, str):
        with suppress(ValueError):
            return float(parsed)
    return parsed


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Sweep:
    """out: its folder. parallel: runs at once."""

    trials: Sequence[Trial]
    out: Path
    resources: Resources
    profile: Profile
    parallel: int | None = None

    @property
    def folder(self) -> Path:
        return self.out / "slurm"

    @cached_property
    def left(self) -> list[Trial]:
        """Trials that are not at their end."""
        return [trial for trial in self.trials if not trained(trial.recipe)]

    def work(self, some: Sequence[Trial], *, write: bool = True) -> Work:
        """The array of these trials. write: put their recipes and the code where it finds them."""
        tasks = [train_job(trial.recipe, self.resources, self.profile, write=write) for trial in some]
        code = snapshot(self.folder, _plug_ins(some), write=write)
        name = f"sweep-{self.out.name}"
        return Work(
            name,
            self.folder,
            tasks,
            self.resources,
            self.profile,
            code,
            str(self.out),
            parallel=self.parallel,
        )


def _plug_ins(some: Sequence[Trial]) -> list[str]:
    return sorted({name for trial in some for name in trial.recipe.objectives if "." in name})


def send_left(sweep: Sweep) -> dict[str, str]:
    """Send the trials that are neither done nor under way, as one array; the job of each.

    Raises:
        UserError: Slurm refuses it, or a folder holds another run.
    """
    under_way = _under_way(sweep, ledger.settled(lambda jobs: _under_way(sweep, jobs).values()))
    some = [trial for trial in sweep.left if trial.name not in under_way]
    if not some:
        return {}
    work = sweep.work(some)
    profile = sweep.profile.model_dump(mode="json", exclude_defaults=True)
    jobs = [job.job_id for job in send(work, "slurm")]
    ledger.note(work, WHAT, [trial.name for trial in some], ledger.array(jobs[0]), "slurm")
    asked = sweep.resources
    for trial, task, job in zip(some, work.tasks, jobs):  # so that the run itself tells of it, and can go on alone
        records.append(
            trial.run / "slurm", "submitted", job=job, name=trial.recipe.name, nodes=asked.nodes,
            most_nodes=asked.most_nodes, ranks_per_node=asked.ranks_per_node,
            recipe=Path(getattr(task, "recipe_file", "")).name, cluster="slurm", code=work.code.name, after=[],
            profile=profile, cwd=os.getcwd(), logs=str(work.folder),
        )  # fmt: skip
    return dict(zip([trial.name for trial in some], jobs))


def run_left(sweep: Sweep) -> Iterator[tuple[Trial, int, Path]]:
    """Train what is not done on this machine; each trial as it ends, with its exit code and its log."""
    works = [training(trial.recipe, sweep.resources, sweep.profile) for trial in sweep.left]
    of = dict(zip(map(id, works), sweep.left))

    def start(work: Work) -> submitit.Job[Any]:
        return submit(work, "local")

    for work, job, code in run_here(works, start, sweep.parallel or 1):
        yield of[id(work)], code, log_file(work.folder, job.job_id)


def _under_way(sweep: Sweep, jobs: queue.Jobs) -> dict[str, queue.Queued]:
    """Trials that wait or run, by name: elements of an array, or submitted alone."""
    return {trial.name: own[0] for trial in sweep.trials if (own := jobs.of(trial.run))}


# ---------------------------------------------------------------- the table


def table(sweep: Sweep) -> list[dict[str, Any]]:
    """A row a trial: name, its values, state, step, last loss, and the last of each figure of its evaluations."""
    under_way = _under_way(sweep, queue.Jobs(queue.queued())) if ledger.newest(sweep.folder) else {}
    rows = [_row(trial, under_way.get(trial.name)) for trial in sweep.trials]
    figures = sorted({name for row in rows for name in row if _figure(name)})
    return [row | {name: row.get(name) for name in figures} for row in rows]


def _figure(name: str) -> bool:
    return name.startswith("eval/") and name != "eval/seconds"


def _row(trial: Trial, job: queue.Queued | None) -> dict[str, Any]:
    lines = read_log(trial.run) if (trial.run / "log.jsonl").is_file() else []
    last = lines[-1] if lines else {}
    figures = {name: value for line in lines for name, value in line.items() if _figure(name)}
    values = {key: _parsed(value) for key, value in trial.values.items()}
    state = {"state": _state(trial, job), "step": last.get("step", 0), "loss": last.get("loss")}
    return {"run": trial.name, **values, **state, **figures}


def _state(trial: Trial, job: queue.Queued | None) -> str:
    if trained(trial.recipe):
        return "done"
    if job:
        return f"{job.state.lower()} ({job.job})"
    ended = list(ledger.how_ended(trial.run / "slurm").values())
    if not ended:
        return "not begun"
    return "fewer steps than asked" if ended[-1] == "done" else ended[-1]
