"""The optimizer of a recipe, in two groups: matrices, and the vectors and scalars that published recipes treat apart.

The rule of what a vector is is open_clip 3.3's (its published numbers): norms, biases, the class token and the
temperature are vectors, whatever dimensions of length one they carry; position embeddings are matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pretrain.optim.lars import Lars
from pretrain.optim.schedule import Rates
from pretrain.recipe import OptimizerRecipe


def build_optimizer(parameters: Mapping[str, nn.Parameter], recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over all of `parameters` that require a gradient; `set_rates` before every step."""
    groups = _groups(parameters, recipe)
    if recipe.name == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)
    kind: dict[str, Any] = {"lr": recipe.lr, "momentum": recipe.momentum, "nesterov": recipe.nesterov}
    if recipe.name == "lars":
        return Lars(groups, trust_coefficient=recipe.trust_coefficient, **kind)
    # not fused: torch's fused SGD fails where some parameters have no momentum yet, as prototypes frozen at first
    return torch.optim.SGD(groups, **kind)


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """One learning rate for all groups, and the weight decay for those that are decayed."""
    for group in optimizer.param_groups:
        group["lr"] = rates.lr
        group["weight_decay"] = rates.weight_decay if group["decayed"] else 0.0


def _groups(parameters: Mapping[str, nn.Parameter], recipe: OptimizerRecipe) -> list[dict[str, Any]]:
    """Matrices, then vectors; an empty group is left out. `adapted` is read by LARS alone."""
    trained = [p for p in parameters.values() if p.requires_grad]
    vectors = [p for p in trained if recipe.exclude_vectors and p.squeeze().ndim < 2]
    apart = set(vectors)
    matrices = [p for p in trained if p not in apart]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay, "decayed": True, "adapted": True},
        {"params": vectors, "weight_decay": 0.0, "decayed": False, "adapted": False},
    ]
    return [group for group in groups if group["params"]]
