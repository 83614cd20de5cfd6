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
from pretrain.optim.muon import MuonAndAdamW
from pretrain.optim.schedule import Rates
from pretrain.recipe import OptimizerRecipe

TOWERS = ("image.backbone.", "text.")
_BLOCK = re.compile(r"(?:blocks|stages|layers)\.(\d+)\.|layer(\d+)\.")
"""timm's names of a tower's blocks, or of the stages of a convolutional one."""


def build_optimizer(parameters: Mapping[str, nn.Parameter], recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over all of `parameters` that require a gradient; `set_rates` before every step.

    Raises:
        UserError: layer_decay or muon for towers without blocks, or without matrices in them.
    """
    groups = _groups(parameters, recipe)
    if recipe.name in ("adamw", "muon"):
        adamw: dict[str, Any] = {"lr": recipe.lr, "betas": recipe.betas, "eps": recipe.eps}
        return (
            MuonAndAdamW(groups, **adamw) if recipe.name == "muon" else torch.optim.AdamW(groups, fused=True, **adamw)
        )
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
    """Matrices, then vectors, each by its share of the learning rate. `adapted` is read by LARS alone, `pieces` by
    Muon."""
    scales = layer_scales(parameters, recipe.layer_decay)
    pieces = muon_pieces(parameters) if recipe.name == "muon" else {}
    groups: dict[tuple[int, bool, float], list[nn.Parameter]] = defaultdict(list)
    for name, p in parameters.items():
        if p.requires_grad:
            vector = recipe.exclude_vectors and sum(n > 1 for n in p.shape) < 2
            groups[pieces.get(name, 0), vector, scales[name]].append(p)
    return [
        {"params": params, "weight_decay": 0.0 if vector else recipe.weight_decay, "decayed": not vector,
         "adapted": not vector, "lr_scale": scale, "pieces": n}
        for (n, vector, scale), params in sorted(groups.items(), key=lambda group: group[0])
    ]  # fmt: skip


def muon_pieces(parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """The trained matrices of the towers' blocks, and how many each is: three where queries, keys and values are one.

    Raises:
        UserError: towers that have none, as of convolutions alone.
    """
    found: dict[str, int] = {}
    towers = {name: p for name, p in parameters.items() if p.requires_grad and name.startswith(TOWERS)}
    for name, p in towers.items():
        inside = any(_BLOCK.match(name.removeprefix(tower)) for tower in TOWERS)
        if inside and p.ndim == 2 and min(p.shape) > 1:
            found[name] = 3 if name.endswith("qkv.weight") else 1
    if towers and not found:
        raise UserError("optimizer.name muon: no block of the towers has a trained matrix; take adamw")
    return found
