"""Regions of an image through the last layers of its tower: PyramidCLIP's region branch (Gao et al. 2022, §3.2).

A region enters as one token: its feature and the four numbers of its box, brought to the tower's width by one linear
map. In a ViT the tokens run, behind the class token and without position embeddings, through the last blocks; in
CLIP's ResNets through the attention pool. The feature is a detector's, stored with the sample, or the mean of the
tower's own map under the box (RoIAlign); the map is detached, so regions train the branch and the last layers only.
Places of a row that hold no region are masked as keys; rows without any region cost nothing and give zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.ops  # noqa: F401  registers torch.ops.torchvision
from timm.layers import AttentionPool2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.models.leff import LeFF
from pretrain.recipe import RegionRecipe
from pretrain.views.regions import Regions


class RegionBranch(nn.Module):
    """What regions need beside the tower they share: `embed`, and in front of an attention pool a norm."""

    def __init__(self, recipe: RegionRecipe, backbone: Any, name: str) -> None:
        super().__init__()
        self.blocks = 0
        self.norm: nn.LayerNorm | None = None
        if (
            isinstance(backbone, VisionTransformer)
            and backbone.cls_token is not None
            and backbone.global_pool == "token"
        ):
            self.blocks, width = recipe.blocks, backbone.embed_dim
            front = max(1, sum(isinstance(block.mlp, LeFF) for block in backbone.blocks))  # regions are no grid
            if self.blocks + front > len(backbone.blocks):
                raise UserError(
                    f"model.regions.blocks {self.blocks}: {name} has {len(backbone.blocks)} blocks in all, and regions "
                    f"cannot run through the first {front} (model.leff, or what their map is made by)"
                )
        elif isinstance(getattr(backbone, "head", None), AttentionPool2d):
            width = backbone.num_features
            self.norm = nn.LayerNorm(width)
        else:
            raise UserError(f"model.regions needs a ViT with a class token or one of CLIP's ResNets, not {name}")
        self.embed = nn.Linear((recipe.stored_dim or width) + 4, width, bias=False)
        nn.init.normal_(self.embed.weight, std=width**-0.5)

    def map_layer(self, backbone: Any) -> int | None:
        """The block whose tokens are the map that regions are cut from; None: the end of the trunk."""
        return len(backbone.blocks) - self.blocks - 1 if self.blocks else None

    def forward(
        self, backbone: Any, project: Callable[[Tensor], Tensor], regions: Regions, image_map: Tensor | None
    ) -> Tensor:
        """(b, embed_dim) the rows' regions in the shared space, zeros where a row has none.

        project: the tower's, of pooled features.
        image_map: (b, C, g, g) of the crop that the boxes are shares of; None where features are stored.
        """
        there = regions.mask.any(dim=1).nonzero()[:, 0]
        rows = Regions(*(part.index_select(0, there) for part in regions))
        weight = self.embed.weight
        found = rows.features.to(weight.dtype)
        if image_map is not None:
            found = torch.cat((_cut(image_map.index_select(0, there).to(weight.dtype), rows), rows.boxes.to(weight)), 2)
        tokens = self.embed(found)
        pooled = self._blocks(backbone, tokens, rows.mask) if self.blocks else self._pool(backbone, tokens, rows.mask)
        embedding = project(pooled)
        return embedding.new_zeros(len(regions.mask), embedding.shape[1]).index_copy(0, there, embedding)

    def _blocks(self, vit: Any, tokens: Tensor, mask: Tensor) -> Tensor:
        x = torch.cat((vit.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens), dim=1)
        seen = F.pad(mask, (1, 0), value=True)[:, None, None]  # (n, 1, 1, 1 + M): the class token is always there
        x = vit.norm_pre(x)
        for block in vit.blocks[-self.blocks :]:
            x = block(x, attn_mask=seen)
        return vit.forward_head(vit.norm(x), pre_logits=True)

    def _pool(self, resnet: Any, tokens: Tensor, mask: Tensor) -> Tensor:
        """CLIP's attention pool without position embeddings: the mean token asks, all answer."""
        assert self.norm is not None
        pool = resnet.head
        count = mask.sum(dim=1, keepdim=True)[..., None]
        mean = tokens.masked_fill(~mask[..., None], 0.0).sum(dim=1, keepdim=True) / count
        x = self.norm(torch.cat((mean, tokens), dim=1))
        q, k, v = (_heads(part(y), pool.num_heads) for part, y in ((pool.q, x[:, :1]), (pool.k, x), (pool.v, x)))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=F.pad(mask, (1, 0), value=True)[:, None, None])
        return mixed.transpose(1, 2).flatten(1)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(n, L, C) -> (n, heads, L, C / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _cut(image_map: Tensor, rows: Regions) -> Tensor:
    """(n, M, C) the mean of each row's map under each box; zeros where there is no region."""
    n, channels, height, width = image_map.shape
    row, place = rows.mask.nonzero().unbind(1)
    boxes = rows.boxes[row, place].to(image_map) * image_map.new_tensor([width, height, width, height])
    with torch.autocast("cuda" if image_map.is_cuda else "cpu", enabled=False):  # there is none of the meta device
        # the kernel itself: no backward runs, for whose sake torchvision's function compiles another on a GPU
        numbered = torch.cat((row[:, None].to(boxes), boxes), 1)
        cut = torch.ops.torchvision.roi_align(image_map, numbered, 1.0, 1, 1, -1, True)
    found = image_map.new_zeros(n, rows.mask.shape[1], channels)
    found[row, place] = cut.flatten(1)
    return found
