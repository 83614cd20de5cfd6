"""AdamW over named parameters, in the two groups of CLIP: matrices are decayed, vectors and scalars are not.

The rule is open_clip 3.3's (its published numbers): norms, biases, the class token and the temperature are vectors,
whatever dimensions of length one they carry; position embeddings are matrices and are decayed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from pretrain.recipe import OptimizerRecipe


def build_adamw(parameters: Mapping[str, nn.Parameter], recipe: OptimizerRecipe) -> torch.optim.AdamW:
    """AdamW over all of `parameters` that require a gradient."""
    trained = [p for p in parameters.values() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.squeeze().ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.squeeze().ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One learning rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
