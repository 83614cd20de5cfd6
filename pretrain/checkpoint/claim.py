"""Whose a place for checkpoints is: `run-<id>.json` in it names the one run that writes there.

A run puts its own file first and looks for others' then, so that of two that come at once at least one sees the other.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

from pretrain.checkpoint.errors import CheckpointError, unreadable
from pretrain.checkpoint.layout import step_dirs
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.store import Store, Where, open_store
from pretrain.patience import patiently

_CLAIM = re.compile(r"run-(.+)\.json")


def _name(run: str) -> str:
    return f"run-{run}.json"


def claim(root: Where, run: str, told: dict[str, str]) -> None:
    """Make `root` the place of run `run`, of which `told` tells others. Called by one rank.

    Raises:
        CheckpointError: it is another run's; nothing is changed there.
    """
    store = open_store(root)
    before = owners(store)
    others = before - {run} if before else _writer(store) - {run}
    if run in before:
        _refuse_copy(store, run, told)
    elif not others:
        store.write(_name(run), [json.dumps(told).encode()])
        store.settle()
        others = owners(store) - {run}
        if others:
            store.remove([_name(run)])
    if others:
        raise CheckpointError(_refusal(store, min(others)))


def _refuse_copy(store: Store, run: str, told: dict[str, str]) -> None:
    """A run folder that was copied has the id of the first, and would take away its checkpoints."""
    first = _told(store, run).get("output", told["output"])
    with suppress(OSError):
        if first != told["output"] and (Path(first) / "run_id").read_text().strip() == run:
            raise CheckpointError(
                f"{store} is where {first} keeps its checkpoints, and {told['output']} is a copy of that run "
                f"(id {run}). Give the copy a checkpoint.to of its own and remove its file run_id"
            )


def owners(root: Where) -> set[str]:
    """The ids of the runs whose place it is: one at most, but for a mishap."""
    store = open_store(root)
    try:
        return {match[1] for name in patiently(store.names) if (match := _CLAIM.fullmatch(name))}
    except OSError as error:
        raise unreadable(f"{store}: the list of what it holds", error) from error


def _writer(store: Store) -> set[str]:
    """The run that wrote the newest checkpoint there, where it says so."""
    for folder in step_dirs(store).values():
        with suppress(CheckpointError):
            run = read_manifest(folder).run
            return {run} if run else set()
    return set()


def _refusal(store: Store, run: str) -> str:
    told = "".join(f", {name} {value}" for name, value in _told(store, run).items())
    return (
        f"{store} is where another run keeps its checkpoints (id {run}{told}). Give this one a place of its own, "
        f"checkpoint.to={store}/NAME. If it is that very run, and its folder is lost, write the id into the file "
        f"run_id of the new folder; to begin anew in that place, empty it, {_name(run)} too"
    )


def _told(store: Store, run: str) -> dict[str, str]:
    """What the claim of `run` tells of it."""
    with suppress(OSError, ValueError):
        if isinstance(found := json.loads(store.read(_name(run))), dict):
            return found
    return {}
