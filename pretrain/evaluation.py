"""Evaluation while a run goes on, loaded by name: what evaluates stands above what trains, and imports it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol

from pretrain.backends import Backend
from pretrain.recipe import Recipe


class LiveEvaluation(Protocol):
    """The evaluation that `recipe.evaluate` asks for, over the ranks of the run."""

    missed: bool
    """The newest gave no figures: its data could not be read, or its vectors were not finite."""

    def run(self, step: int, beat: Callable[[], None], stop: Callable[[], bool]) -> dict[str, float] | None:
        """Figures of the weights as they stand after `step` steps, by their names in the log (`eval/knn_top1`).

        Called by all ranks together; training goes on afterwards as if it had not been. Between batches `beat` is
        called, and `stop`, which all ranks ask equally often and must be answered alike: once it is true, all leave
        at that batch with None.
        """


def live_evaluation(recipe: Recipe, backend: Backend) -> LiveEvaluation | None:
    """What evaluates the weights in `backend`; None where the recipe asks for no evaluation.

    Raises:
        UserError: an evaluation that could not be done: it names the field of `evaluate`.
    """
    if recipe.evaluate is None:
        return None
    return importlib.import_module("downstream.live").Live(recipe, recipe.evaluate, backend)


def check_evaluation(recipe: Recipe) -> None:
    """UserError where the data or the model cannot be evaluated as the recipe asks; no weights are needed."""
    if recipe.evaluate is not None:
        importlib.import_module("downstream.live_sets").open_sets(recipe, recipe.evaluate)
