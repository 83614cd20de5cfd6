"""The optimizer of a recipe, in groups: matrices, and the vectors and scalars that published recipes treat apart, each
once for every share of the learning rate (`layer_decay`).

The rule of what a vector is is open_clip 3.3's (its published numbers): norms, biases, the class token and the
temperature are vectors, whatever dimensions of length one they carry; position embeddings are matrices.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pretrain.errors import UserError
from pretrain.optim.lars import Lars
from pretrain.optim.schedule import Rates
from pretrain.recipe import OptimizerRecipe

TOWERS = ("image.backbone.", "text.")
_BLOCK = re.compile(r"(?:blocks|stages|layers)\.(\d+)\.|layer(\d+)\.")
"""timm's names of a tower's blocks, or of the stages of a convolutional one."""


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
    """The learning rate, each group its share, and the weight decay for those that are decayed."""
    for group in optimizer.param_groups:
        group["lr"] = rates.lr * group["lr_scale"]
        group["weight_decay"] = rates.weight_decay if group["decayed"] else 0.0


def layer_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """The share of the learning rate of each parameter, named in a trunk's order (BEiT, Bao et al. 2022, §3.2).

    decay^(N - n) for block n of the N of its tower, counted from 1; decay^N for the embeddings, which are all that
    stands before the blocks; 1 for what stands behind them, for projections, and for parameters of no tower.

    Raises:
        UserError: a tower without blocks, or one whose names do not say which is which.
    """
    scales = dict.fromkeys(names, 1.0)
    for tower in TOWERS if decay < 1 else ():
        own = [name for name in scales if name.startswith(tower)]
        blocks = [int(found[1] or found[2]) if (found := _BLOCK.match(n.removeprefix(tower))) else None for n in own]
        numbers = sorted({block for block in blocks if block is not None})
        if own and not numbers:
            raise UserError(f"optimizer.layer_decay: {own[0]} … are no blocks or stages in a row; set it to 1")
        depth = 0
        for name, block in zip(own, blocks):
            behind = block is None and depth > 0
            depth = len(numbers) if behind else depth if block is None else 1 + numbers.index(block)
            scales[name] = decay ** (len(numbers) - depth)
    return scales


def _groups(parameters: Mapping[str, nn.Parameter], recipe: OptimizerRecipe) -> list[dict[str, Any]]:
    """Matrices, then vectors, each by its share of the learning rate. `adapted` is read by LARS alone."""
    scales = layer_scales(parameters, recipe.layer_decay)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
    for name, p in parameters.items():
        if p.requires_grad:
            groups[recipe.exclude_vectors and p.squeeze().ndim < 2, scales[name]].append(p)
    return [
        {"params": params, "weight_decay": 0.0 if vector else recipe.weight_decay, "decayed": not vector,
         "adapted": not vector, "lr_scale": scale}
        for (vector, scale), params in sorted(groups.items(), key=lambda group: group[0])
    ]  # fmt: skip
