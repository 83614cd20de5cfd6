"""The stages of a pipeline as data: what each runs, what it stands on, and what it leaves behind."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pretrain.errors import UserError

if TYPE_CHECKING:  # its names are in the help, which answers at once
    from pretrain.recipe import Recipe

Room = Literal["train", "encoder", "files"]
"""What a stage asks for: the training's resources, a process with an encoder, or cores alone."""

TRAIN = "train"
TRAINED = "{trained}"
"""In a command: the weights that training ended with, as RUN_ID-step_N; known when the stage runs."""

RESULTS = {"retrieval": "zeroshot_retrieval_*", "knn": "knn_*", "zeroshot": "zeroshot_classification_*"}
"""Tasks of `downstream`, and the files of their results."""

LOOKED_AT = 1000
"""Members of a tar by which it is told what its samples have."""
NO_CLASS = b"-1"
"""In the `cls` of a sample that has none."""


@dataclass(frozen=True)
class Stage:
    """One command of polyview, or an array that shares it.

    needs: stages that must have ended well. makes: a pattern of what lies there when it has. parts: elements of the
    array. inputs: a digest of the shards it reads; with other ones it is done again.
    """

    name: str
    argv: tuple[str, ...]
    needs: tuple[str, ...] = ()
    makes: str = ""
    room: Room = "files"
    parts: int = 1
    inputs: str = ""

    @property
    def command(self) -> tuple[str, ...]:
        """What its jobs are told from those of another command by."""
        return (*self.argv, f"parts={self.parts}") if self.parts > 1 else self.argv


@dataclass(frozen=True)
class Asked:
    """What a pipeline is to do, beside training its recipe.

    shards: embedded and evaluated. train: labelled ones that vote, for kNN. collection: to publish into, one that may
    hold other embeddings; None: one of its own in `out`. tasks: of RESULTS; None: all that the towers
    and the data allow.
    """

    out: Path
    shards: str
    train: str | None = None
    collection: Path | None = None
    tasks: Sequence[str] | None = None
    parts: int = 12


def stages(recipe: Recipe, asked: Asked) -> list[Stage]:
    """Every stage behind those that it needs.

    Raises:
        UserError: there are no such shards, or a task lacks what it needs.
    """
    run, out = str(recipe.output.absolute()), str(asked.out.absolute())
    shards, tars = _seen(asked.shards)
    embeddings, collection = (
        f"{out}/embeddings/{TRAINED}",
        str((asked.collection or Path(out, "collection")).absolute()),
    )
    replace = () if asked.collection else ("--replace",)  # its own holds what was embedded last, whatever trained it
    embed = ("embed", run, shards, "--out", embeddings)
    build = ("build", collection, "--from", embeddings, *replace)
    evaluations = [_evaluation(task, run, out, shards, asked.train) for task in _tasks(recipe, asked, tars)]
    results = ("--results", f"{out}/results") if evaluations else ()
    report = ("report", run, *results, "--out", f"{out}/report.html")
    lies, held = glob.escape(out), glob.escape(collection)
    return [
        Stage(TRAIN, ("train", run), room="train"),
        Stage(
            "embed", embed, (TRAIN,), f"{lies}/embeddings/{TRAINED}/plan.json", "encoder",
            max(1, min(asked.parts, len(tars))), _digest(tars),
        ),
        Stage("build", build, (TRAIN, "embed"), f"{held}/versions/*"),
        Stage("publish", ("publish", collection), ("build",), f"{held}/CURRENT"),
        *evaluations,
        Stage("report", report, (TRAIN, *(stage.name for stage in evaluations)), f"{lies}/report.html"),
    ]  # fmt: skip


def _tasks(recipe: Recipe, asked: Asked, tars: Sequence[Path]) -> list[str]:
    lacking = {} if asked.train else {"knn": "--train SHARDS, labelled images that vote"}
    if recipe.model.text is None:
        lacking |= dict.fromkeys(("retrieval", "zeroshot"), "a text tower, and the recipe has model.text: null")
    if asked.tasks is None:
        judged = _judged(tars, asked.train)
        return [task for task in RESULTS if task not in lacking and task in judged]
    for task in asked.tasks:
        if task in lacking:
            raise UserError(f"--tasks {task} needs {lacking[task]}")
    return [task for task in RESULTS if task in asked.tasks]


def _judged(tars: Sequence[Path], voting: str | None) -> set[str]:
    """Tasks that the first samples have what it takes for: captions, class numbers, names of the classes."""
    there, found = _parts(tars), set()
    if "txt" in there:
        found.add("retrieval")
    if "cls" in there and any((folder / "classnames.txt").is_file() for folder in list(tars[0].parents)[:2]):
        found.add("zeroshot")
    if "cls" in there and voting and "cls" in _parts(_seen(voting)[1]):
        found.add("knn")
    return found


def _parts(tars: Sequence[Path]) -> set[str]:
    """What samples of the first tar that holds some have: extensions, such as `png` and `cls`."""
    try:
        return next(filter(None, map(_parts_of, tars)), set())
    except OSError as error:
        raise UserError(f"shard {error.filename} cannot be read: {error.strerror}") from error


def _parts_of(tar: Path) -> set[str]:
    from pretrain.shards.grouping import split_name
    from pretrain.shards.tarwalk import Member, walk

    found = set()
    with tar.open("rb") as file:
        for member in itertools.islice(walk(file.fileno(), tar.stat().st_size), LOOKED_AT):
            if not isinstance(member, Member) or not (named := split_name(member.name)):
                continue
            if named[1] != "cls" or os.pread(file.fileno(), member.size, member.offset).strip() != NO_CLASS:
                found.add(named[1])
    return found


def _evaluation(task: str, run: str, out: str, shards: str, train: str | None) -> Stage:
    tars = _seen(shards)[1]
    data: tuple[str, ...] = (shards,)
    if task == "knn":
        voting, more = _seen(str(train))
        data, tars = ("--train", voting, "--test", shards), tars + more
    makes = f"{glob.escape(out)}/results/{RESULTS[task]}.json"
    return Stage(task, (task, run, *data, "--out", f"{out}/results"), (TRAIN,), makes, "encoder", 1, _digest(tars))


def _seen(spec: str) -> tuple[str, list[Path]]:
    """Shards as a job names them, wherever it is sent from, and the tars that they are now."""
    from pretrain.shards.source import expand_shards

    spec = spec if spec.startswith(("/", "{")) else os.path.abspath(spec)
    tars = [shard.path for shard in expand_shards(spec)]
    if not tars:
        raise UserError(f"no shards in {spec}: name a folder of *.tar, a glob, or a tar")
    return spec, tars


def _digest(tars: Sequence[Path]) -> str:
    told = [f"{tar}\0{(stat := tar.stat()).st_size}\0{stat.st_mtime_ns}" for tar in tars]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
