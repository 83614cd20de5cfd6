"""Certify a recipe: the reference here, then every world as processes of its own on this machine (`worlds.py`)."""

from __future__ import annotations

import datetime
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from pretrain.backend_names import BACKENDS
from pretrain.certify.cells import Cell
from pretrain.certify.peers import Peer
from pretrain.certify.reference import references
from pretrain.certify.shrink import ROWS, shrink, steady
from pretrain.certify.table import Certificate
from pretrain.errors import UserError
from pretrain.recipe import Recipe, dump_recipe
from pretrain.telemetry.provenance import versions

log = logging.getLogger(__name__)

WORLDS = (1, 2, 3)
ACCUMULATIONS = (1, 4)


def certify(
    recipe: Recipe,
    *,
    full: bool = False,
    worlds: Sequence[int] = WORLDS,
    backends: Sequence[str] = BACKENDS,
    accumulations: Sequence[int] = ACCUMULATIONS,
) -> Certificate:
    """Every backend x world x accumulation against float64; `full` leaves the towers at their size.

    Nothing is read but the recipe, and nothing but a temporary folder is written.

    Raises:
        UserError: a world that does not divide the batch; a model or an objective that cannot be built, or whose own
            gradients are not the textbook's; a world that ended with an error.
    """
    for world in worlds:
        if ROWS % (world * max(accumulations)):
            raise UserError(f"--worlds {world}: {ROWS} rows do not divide into {world} x {max(accumulations)} parts")
    small, notes = (steady if full else shrink)(recipe)
    expected, source = references(small, worlds, accumulations)
    cells: list[Cell] = []
    peers: list[Peer] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "recipe.yaml").write_text(dump_recipe(small))
        asked = {"worlds": worlds, "backends": backends, "accumulations": accumulations}
        (folder / "asked.json").write_text(json.dumps(asked))
        for name, gradients in expected.items():
            save_file({n: g.contiguous() for n, g in gradients.items()}, folder / f"{name}.safetensors")
        log.info(f"{recipe.name}: worlds {', '.join(map(str, worlds))}")
        _run_worlds(folder)
        for world in worlds:
            found = json.loads((folder / f"found_{world}.json").read_text())
            cells += [Cell(**c) for c in found["cells"]]
            peers += [Peer(**p) for p in found["peers"]]
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": recipe.seed,
        "versions": versions(),
        "made small": notes,
        "reference": f"held against {source}",
    }
    return Certificate(recipe.name, about, cells, peers)


def _run_worlds(folder: Path) -> None:
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # a rank: sums come in one order
    done = subprocess.run([sys.executable, "-m", "pretrain.certify.worlds", str(folder)], env=one_thread, check=False)
    if done.returncode:
        raise UserError("certify: a world ended with an error, told above")
