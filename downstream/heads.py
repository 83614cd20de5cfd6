"""What objectives keep beside the trunk, read back from a checkpoint in evaluation mode: projectors and gates.

The objective is built again from the checkpoint's own recipe, and one module of it is filled. Objectives whose
projector is no plain chain of layers are not looked at.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from torch import nn

from downstream.weights import Weights
from pretrain.checkpoint import Checkpoint, find_checkpoint
from pretrain.errors import UserError
from pretrain.objectives import build
from pretrain.objectives.base import Objective, RunFacts
from pretrain.objectives.hydra import Hydra
from pretrain.objectives.pieces.gates import Gates

M = TypeVar("M", bound=nn.Module)

PROJECTORS = ("projector", "head")  # Hydra's; SwAV's and MoCo's


def open_projector(weights: Weights, path: Path) -> tuple[str, nn.Module] | None:
    """(objective, its projector from pooled features) of the checkpoint that `weights` are of; None: it has none.

    Of several objectives, the first that has one.
    """
    if weights.which != "model":  # the projector was trained with it, and is kept as it was trained
        return None
    checkpoint = find_checkpoint(path)
    for name in checkpoint.meta["recipe"]["objectives"]:
        objective = _objective(name, checkpoint, weights)
        for attribute in PROJECTORS:
            module = getattr(objective, attribute, None)
            if isinstance(module, nn.Sequential):
                return name, _filled(module, f"{name}.{attribute}", checkpoint, weights)
    return None


def open_gates(weights: Weights, path: Path) -> Gates:
    """The gates of a Hydra run.

    Raises:
        UserError: no objective of the run is Hydra, or it was trained with `gate: open`.
    """
    checkpoint = find_checkpoint(path)
    for name in checkpoint.meta["recipe"]["objectives"]:
        objective = _objective(name, checkpoint, weights)
        if isinstance(objective, Hydra):
            if objective.gates is None:
                raise UserError(f"{path}: this run has objectives.{name}.gate: open, so there are no gates to read")
            return _filled(objective.gates, f"{name}.gates", checkpoint, weights)
    objectives = ", ".join(checkpoint.meta["recipe"]["objectives"])
    raise UserError(f"{path}: only runs with objectives.hydra have gates; this one has {objectives}")


def _objective(name: str, checkpoint: Checkpoint, weights: Weights) -> Objective:
    """The objective as the run began with it."""
    recipe = checkpoint.meta["recipe"]
    facts = RunFacts(
        pooled_dim=weights.trunk.pooled_dim,
        global_batch=recipe["global_batch"],
        total_steps=recipe.get("steps") or 1,
        samples=recipe["global_batch"],
        seed=recipe.get("seed", 0),
    )
    return build({name: recipe["objectives"][name]}, facts)[name]


def _filled(module: M, name: str, checkpoint: Checkpoint, weights: Weights) -> M:
    """`module` with the checkpoint's tensors, or at its first weights where `weights` are untrained."""
    if not weights.untrained:
        prefix = f"objective.{name.rpartition('.')[0].replace('.', '_')}.{name.rpartition('.')[2]}."
        module.load_state_dict({n: checkpoint.read(prefix + n) for n in module.state_dict()})
    return module.eval().to(weights.encoder.device)
