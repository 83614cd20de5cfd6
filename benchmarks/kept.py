"""A training run in a process of its own, its CPU seconds counted; what is finished is not done again."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from pretrain.errors import UserError
from pretrain.recipe import Recipe, dump_recipe, load_recipe

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def check_same(folder: Path, recipe: Recipe) -> None:
    """UserError for a folder that holds a run of other settings: its figures are not this run's."""
    kept = folder.with_suffix(".yaml")
    if folder.exists() and not (kept.exists() and load_recipe(kept) == recipe):
        raise UserError(f"{folder} holds a run of other settings: remove it, or give another --work")


def train(folder: Path, recipe: Recipe, module: str = "pretrain", *, resumes: bool = True) -> float | None:
    """CPU seconds of the whole process, its start included; None where an earlier one did a part of it."""
    timed, file = folder / "cpu_s.json", folder.with_suffix(".yaml")
    if timed.exists():
        return json.loads(timed.read_text())
    begun = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_recipe(recipe))
    before = children_cpu_s()
    subprocess.run([sys.executable, "-m", module, str(file)], check=True, env=ENVIRONMENT)
    cpu_s = None if begun and resumes else children_cpu_s() - before
    timed.write_text(json.dumps(cpu_s))
    return cpu_s


def children_cpu_s() -> float:
    """CPU seconds of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
