"""A ViT's MLP that mixes neighbouring patches: the locally-enhanced feed-forward of CeiT (Yuan et al. 2021, §3.2).

As PyramidCLIP has it in the first blocks of its ViTs: batch-normalised, so it is batch-coupled, and the class token
goes by unchanged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.models.text import QuickGELU


class LeFF(nn.Module):
    """Linear, depthwise 3 x 3 over the patches' grid, linear; normalised and QuickGELU after each."""

    def __init__(self, width: int, hidden: int, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.fc1 = nn.Linear(width, hidden)
        self.norm1 = nn.BatchNorm1d(hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.norm3 = nn.BatchNorm1d(width)
        self.act = QuickGELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, prefix + g², C) tokens, the patches in rows of g -> the same shape; prefix tokens are as they came."""
        patches = x[:, self.prefix :]
        batch, length, _ = patches.shape
        grid = math.isqrt(length)
        y = self.act(self.norm1(self.fc1(patches).flatten(0, 1)))  # (B g², hidden)
        y = y.view(batch, grid, grid, -1).permute(0, 3, 1, 2)
        y = self.act(self.norm2(self.conv(y))).permute(0, 2, 3, 1).flatten(0, 2)
        y = self.act(self.norm3(self.fc2(y))).view_as(patches)
        return torch.cat((x[:, : self.prefix].to(y.dtype), y), dim=1)


def use_leff(backbone: nn.Module, blocks: int, name: str) -> None:
    """Give the first `blocks` blocks of a ViT a LeFF for their MLP.

    Raises:
        UserError: another tower, or more blocks than it has.
    """
    if not isinstance(backbone, VisionTransformer) or blocks > len(backbone.blocks):
        raise UserError(f"model.leff {blocks}: {name} is no ViT of at least {blocks} blocks")
    vit: Any = backbone
    for block in vit.blocks[:blocks]:
        block.mlp = LeFF(vit.embed_dim, block.mlp.fc1.out_features, vit.num_prefix_tokens)
