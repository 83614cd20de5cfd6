"""Whose a place for checkpoints is: `run-<id>.json` in it names the one run that writes there.

A run puts its own file first and looks for others' then, so that of two that come at once at least one sees the other.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress

from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.layout import step_dirs
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.patience import patiently, unreadable
from pretrain.checkpoint.store import Store, Where, open_store

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
    if not others and run not in before:
        store.write(_name(run), [json.dumps(told).encode()])
        store.settle()
        others = owners(store) - {run}
        if others:
            store.remove([_name(run)])
    if others:
        raise CheckpointError(_refusal(store, min(others)))


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
    told = ""
    with suppress(OSError, ValueError, AttributeError):
        found = json.loads(store.read(_name(run)))
        told = "".join(f", {name} {value}" for name, value in found.items())
    return (
        f"{store} is where another run keeps its checkpoints (id {run}{told}). Give this one a place of its own, "
        f"checkpoint.to={store}/NAME. If it is that very run, and its folder is lost, write the id into the file "
        f"run_id of the new folder"
    )
