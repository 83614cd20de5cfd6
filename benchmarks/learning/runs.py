"""One run from its recipe to its figures, in a process of its own; what is finished is not done again.

A run's folder holds its recipe, the trainer's own files or lightly's snapshots, and at last `figures-SPLIT.json`. An
interrupted run of ours is taken up by the trainer where it stopped, one of lightly's begins again.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.learning import evaluation, settings
from benchmarks.learning.data import Labelled, load, shards
from benchmarks.learning.settings import Method
from pretrain.errors import UserError
from pretrain.recipe import Recipe, dump_recipe, load_recipe

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class Bench:
    """The data, and where runs are kept."""

    def __init__(self, work: Path, split: str) -> None:
        self.work, self.split = work, split
        self.bank: Labelled = load(work / "data", "train")
        self.queries: Labelled = load(work / "data", split)

    def untrained(self, seed: int) -> dict[str, Any]:
        """Figures of the tower's first weights."""
        return evaluation.neighbours(evaluation.untrained(seed), self.bank, self.queries)

    def run(self, method: Method, name: str, seed: int) -> dict[str, Any]:
        """Train, unless that is done, and judge: `steps`, `cpu_s`, kNN, and for ours the spectra."""
        folder = self.work / "runs" / f"{name}-{seed}"
        kept = folder / f"figures-{self.split}.json"
        self._check_same(method, folder, seed)
        if not kept.exists():
            cpu_s = self._train(method, folder, seed)
            figures = {"steps": method.steps, "cpu_s": cpu_s, **self._judge(method, folder)}
            kept.write_text(json.dumps(figures, indent=1) + "\n")
        return json.loads(kept.read_text())

    def until(self, method: Method, name: str, seed: int, cpu_s: float) -> dict[str, Any]:
        """Figures of the last snapshot of a finished run of lightly's taken within `cpu_s` of CPU; {} if none."""
        folder = self.work / "runs" / f"{name}-{seed}"
        found: dict[str, Any] = {}
        for snapshot in sorted(folder.glob("*.pt")):
            tower, spent = evaluation.of_lightly(snapshot)
            if spent <= cpu_s:
                found = {"steps": int(snapshot.stem), "cpu_s": spent, "tower": tower}
        return found and found | evaluation.neighbours(found.pop("tower"), self.bank, self.queries)

    def _train(self, method: Method, folder: Path, seed: int) -> float | None:
        """CPU seconds of the whole process, its start included; null where an earlier one did a part of it."""
        timed, recipe = folder / "cpu_s.json", folder.with_suffix(".yaml")
        if timed.exists():
            return json.loads(timed.read_text())
        begun = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        recipe.write_text(dump_recipe(self._recipe(method, folder, seed)))
        before = _children()
        module = "benchmarks.learning.lightly_swav" if method.peer else "pretrain"
        subprocess.run([sys.executable, "-m", module, str(recipe)], check=True, env=ENVIRONMENT)
        cpu_s = None if begun and not method.peer else _children() - before
        timed.write_text(json.dumps(cpu_s))
        return cpu_s

    def _check_same(self, method: Method, folder: Path, seed: int) -> None:
        """UserError for a folder that holds a run of other settings: its figures are not this run's."""
        kept, wanted = folder.with_suffix(".yaml"), self._recipe(method, folder, seed)
        if folder.exists() and not (kept.exists() and load_recipe(kept) == wanted):
            raise UserError(f"{folder} holds a run of other settings: remove it, or give another --work")

    def _recipe(self, method: Method, folder: Path, seed: int) -> Recipe:
        return settings.recipe(method, shards(self.work / "data", "train"), folder, seed)

    def _judge(self, method: Method, folder: Path) -> dict[str, float]:
        if method.peer:
            tower, _ = evaluation.of_lightly(folder / f"{method.steps:06d}.pt")
            return evaluation.neighbours(tower, self.bank, self.queries)
        figures = evaluation.neighbours(evaluation.trained(folder), self.bank, self.queries)
        return figures | evaluation.spectra(folder, self.queries)


def _children() -> float:
    """CPU seconds of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
