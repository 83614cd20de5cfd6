"""One run from its recipe to its figures, in a process of its own; what is finished is not done again.

A run's folder holds its recipe, the trainer's own files or lightly's snapshots, and at last `figures-SPLIT.json`. An
interrupted run of ours is taken up by the trainer where it stopped, one of lightly's begins again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.kept import check_same, train
from benchmarks.learning import evaluation, settings
from benchmarks.learning.data import Labelled, load, shards
from benchmarks.learning.settings import Method
from pretrain.recipe import Recipe


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
        recipe = self._recipe(method, folder, seed)
        check_same(folder, recipe)
        if not kept.exists():
            module = "benchmarks.learning.lightly_swav" if method.peer else "pretrain"
            cpu_s = train(folder, recipe, module, resumes=not method.peer)
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

    def _recipe(self, method: Method, folder: Path, seed: int) -> Recipe:
        return settings.recipe(method, shards(self.work / "data", "train"), folder, seed)

    def _judge(self, method: Method, folder: Path) -> dict[str, float]:
        if method.peer:
            tower, _ = evaluation.of_lightly(folder / f"{method.steps:06d}.pt")
            return evaluation.neighbours(tower, self.bank, self.queries)
        figures = evaluation.neighbours(evaluation.trained(folder), self.bank, self.queries)
        return figures | evaluation.spectra(folder, self.queries)
