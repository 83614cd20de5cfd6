"""The causal text tower of CLIP, without the padding.

Captions of 12 tokens in a context of 77 waste six sevenths of a tower that computes every place. Under
causal attention nothing after the end-of-text token can reach it, so everything there is left out, exactly:
layers that work token by token (embedding, norms, linear layers) see one packed (T, width) line of real
tokens, attention alone sees the captions side by side, as wide as the batch's longest, and the last block
is finished only at the end-of-text tokens that are pooled. The features equal those of the full context up
to rounding.

It does not tokenize, and it does not normalise its features to unit length.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.recipe import TextRecipe


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): the approximation OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


@dataclass(frozen=True)
class Packing:
    """Where the T real tokens of B captions lie in the (B, L) rectangle that attention works on."""

    captions: int
    """B"""
    longest: int
    """L, the longest caption of the batch, start and end included."""
    place: Tensor
    """(T,) int64: place of each packed token in the flattened (B * L) rectangle."""
    end: Tensor
    """(B,) int64: packed position of each caption's end-of-text token."""

    @classmethod
    def of(cls, tokens: Tensor) -> Packing:
        """The packing of (B, context) ids; a caption ends at its highest id, which is end-of-text."""
        length = tokens.argmax(dim=-1) + 1  # (B,)
        end = length.cumsum(0) - 1
        # one transfer: how much there is must be known on the host to size the tensors
        total, longest = torch.stack((end[-1] + 1, length.max())).tolist()
        caption = torch.repeat_interleave(length, output_size=total)  # (T,)
        start = end + 1 - length
        column = torch.arange(total, device=tokens.device) - start[caption]
        return cls(len(tokens), longest, caption * longest + column, end)

    def spread(self, x: Tensor) -> Tensor:
        """(T, C) packed -> (B, L, C), zero behind each caption's end."""
        rectangle = x.new_zeros(self.captions * self.longest, x.shape[-1]).index_copy(0, self.place, x)
        return rectangle.view(self.captions, self.longest, -1)

    def gather(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (T, C) packed."""
        return x.flatten(0, 1).index_select(0, self.place)


class TextBlock(nn.Module):
    """Pre-norm transformer block over packed tokens."""

    def __init__(self, width: int, heads: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def init(self, residual_std: float) -> None:
        """CLIP's initialisation; biases of the MLP stay at torch's default, as in open_clip."""
        width = self.qkv.in_features
        nn.init.normal_(self.qkv.weight, std=width**-0.5)
        nn.init.zeros_(self.qkv.bias)
        nn.init.normal_(self.proj.weight, std=residual_std)
        nn.init.zeros_(self.proj.bias)
        nn.init.normal_(self.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.fc2.weight, std=residual_std)

    def forward(self, x: Tensor, packing: Packing, ends_only: bool = False) -> Tensor:
        """(T, width) packed tokens -> (T, width); with `ends_only` (B, width) at the end-of-text tokens."""
        mixed = self._attend(packing.spread(self.qkv(self.norm1(x))))
        mixed = packing.gather(mixed)
        if ends_only:  # keys and values of the others are used above; nothing else of them is
            x, mixed = x.index_select(0, packing.end), mixed.index_select(0, packing.end)
        x = x + self.drop(self.proj(mixed))
        return x + self.drop(self.fc2(self.act(self.fc1(self.norm2(x)))))

    def _attend(self, qkv: Tensor) -> Tensor:
        captions, longest, _ = qkv.shape
        q, k, v = qkv.view(captions, longest, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, L, width / heads)
        return mixed.transpose(1, 2).flatten(2)


class TextTower(nn.Module):
    """Tokens -> embedding, pooled at the end-of-text token, as CLIP (Radford et al. 2021, §2.4)."""

    def __init__(self, recipe: TextRecipe, embed_dim: int, activation: str) -> None:
        super().__init__()
        self.context = recipe.context
        self.token_embedding = nn.Embedding(recipe.vocab, recipe.width)
        self.positional_embedding = nn.Parameter(torch.empty(recipe.context, recipe.width))
        self.drop = nn.Dropout(recipe.dropout)
        self.blocks: Any = nn.ModuleList(
            TextBlock(recipe.width, recipe.heads, activation, recipe.dropout) for _ in range(recipe.layers)
        )
        self.norm = nn.LayerNorm(recipe.width)
        self.projection = nn.Linear(recipe.width, embed_dim, bias=False)
        self.init()

    def init(self) -> None:
        """CLIP's initialisation (as in open_clip: the deeper, the smaller what a block adds at the start)."""
        width = self.projection.in_features
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.blocks:
            block.init(width**-0.5 * (2 * len(self.blocks)) ** -0.5)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, tokens: Tensor, outputs: Collection[str] = ("embedding",)) -> dict[str, Tensor]:
        """(B, <= context) int64 ids, end-of-text the highest of each row -> the named outputs.

        `pooled` is (B, width), `embedding` its projection (B, embed_dim), not of unit length.

        Raises:
            UserError: captions longer than the tower's context.
        """
        if tokens.shape[1] > self.context:
            raise UserError(
                f"captions of {tokens.shape[1]} tokens, but the text tower has a context of {self.context}; "
                f"tokenize with context {self.context}"
            )
        pooled = self._pooled(tokens)
        found = {"pooled": pooled}
        if "embedding" in outputs:
            found["embedding"] = self.projection(pooled)
        return found

    def _pooled(self, tokens: Tensor) -> Tensor:
        packing = Packing.of(tokens)
        ids = tokens[:, : packing.longest].reshape(-1).index_select(0, packing.place)
        positions = F.embedding(packing.place % packing.longest, self.positional_embedding)
        x = self.drop(self.token_embedding(ids) + positions)  # (T, width)
        for block in self.blocks[:-1]:
            x = block(x, packing)
        return self.norm(self.blocks[-1](x, packing, ends_only=True))
