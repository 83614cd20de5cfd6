"""What the report says of the run itself: its name, its recipe in a few words, its log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.recipe import Recipe
from pretrain.run import RunFolder
from pretrain.telemetry.runlog import read_log


def run_name(run: Path) -> str:
    """The name its recipe gives it, which results of it carry; UserError when this is no run folder."""
    return RunFolder(run).recipe().name


def log_lines(run: Path) -> list[dict[str, Any]]:
    """The run's logged steps; none where it has not begun to log."""
    file = RunFolder(run).log_file
    return read_log(file) if file.is_file() else []


def facts(run: Path, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What stands under the title, by label."""
    recipe = RunFolder(run).recipe()
    last = lines[-1] if lines else {}
    return {
        "Model": _model(recipe),
        "Objectives": " + ".join(recipe.objectives),
        "Global batch": recipe.global_batch,
        "Step": last.get("step"),
        "Samples seen": last.get("samples_seen"),
        "Epochs": last.get("epoch"),
        "Final loss": last.get("loss"),
        "Seed": recipe.seed,
    }


def _model(recipe: Recipe) -> str:
    text = f" + {recipe.model.text.layers}-layer text tower" if recipe.model.text else ""
    return f"{recipe.model.image}, {recipe.model.image_size} px{text}"
