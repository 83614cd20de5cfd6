"""The text towers of CLIP and SigLIP, without the padding where it is none of their business.

Captions of 12 tokens in a context of 77 waste six sevenths of a tower that computes every place. Under
causal attention nothing after the end-of-text token can reach it, so everything there is left out, exactly:
layers that work token by token (embedding, norms, linear layers) see one packed (T, width) line of real
tokens, attention alone sees the captions side by side, as wide as the batch's longest, and the last block
is finished only at the end-of-text tokens that are pooled. The features equal those of the full context up
to rounding. SigLIP's tower attends both ways and reads its padding, so there every place of the context takes
part. Texts that are absent (a row of zeros) take part in nothing, and their features are zero.

It does not tokenize, and it does not normalise its features to unit length.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
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


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}


@dataclass(frozen=True)
class Packing:
    """Where the T tokens of K captions lie in the (K, L) rectangle that attention works on.

    Of B rows of ids, those of zeros alone are no captions: they are in neither, and `restore` gives them back.
    """

    rows: int
    """B"""
    captions: int
    """K"""
    longest: int
    """L, the longest caption of the batch."""
    place: Tensor
    """(T,) int64: place of each packed token in the flattened (K * L) rectangle."""
    end: Tensor
    """(K,) int64: packed position of the token that each caption is pooled at."""
    kept: Tensor
    """(K,) int64: row of each caption."""
    absent: bool
    """No row is a caption: one token runs all the same, so that parameters get gradients (of zero) on every rank."""

    @classmethod
    def of(cls, tokens: Tensor, *, whole: bool, pool: str) -> Packing:
        """The packing of (B, context) ids; end-of-text is a row's highest id, and `whole` goes on to the context."""
        present = tokens.any(dim=-1)
        length, last = _lengths(tokens, present, whole, pool)
        # one transfer: how much there is must be known on the host to size the tensors
        total, longest, captions, some = torch.stack(
            (length.sum(), length.max(), (length > 0).sum(), present.any().long())
        ).tolist()
        kept = torch.repeat_interleave((length > 0).long(), output_size=captions)  # (K,)
        length, last = length[kept], last[kept]
        start = length.cumsum(0) - length
        caption = torch.repeat_interleave(length, output_size=total)  # (T,)
        column = torch.arange(total, device=tokens.device) - start[caption]
        return cls(len(tokens), captions, longest, caption * longest + column, start + last, kept, not some)

    def spread(self, x: Tensor) -> Tensor:
        """(T, C) packed -> (K, L, C), zero behind each caption's end."""
        if len(x) < self.captions * self.longest:
            x = x.new_zeros(self.captions * self.longest, x.shape[-1]).index_copy(0, self.place, x)
        return x.view(self.captions, self.longest, -1)

    def gather(self, x: Tensor) -> Tensor:
        """(K, L, C) -> (T, C) packed."""
        x = x.flatten(0, 1)
        return x if len(self.place) == len(x) else x.index_select(0, self.place)

    def most(self, x: Tensor) -> Tensor:
        """(T, C) packed -> (K, C), the maximum over each caption up to its end."""
        last = self.place[self.end] % self.longest
        behind = torch.arange(self.longest, device=x.device) > last[:, None]
        return self.spread(x).masked_fill(behind[..., None], float("-inf")).amax(1)

    def restore(self, x: Tensor) -> Tensor:
        """(K, C) -> (B, C), rows that are no captions exactly zero."""
        if self.absent:  # not times zero, which would keep a NaN
            return x.new_zeros(self.rows, x.shape[-1]).index_copy(0, self.kept[:0], x[:0])
        return x if self.captions == self.rows else x.new_zeros(self.rows, x.shape[-1]).index_copy(0, self.kept, x)


def _lengths(tokens: Tensor, present: Tensor, whole: bool, pool: str) -> tuple[Tensor, Tensor]:
    """((B,) tokens that take part of each row, (B,) column of the one it is pooled at)."""
    context = tokens.shape[1]
    last = torch.full_like(present, context - 1, dtype=torch.long) if pool == "last" else tokens.argmax(dim=-1)
    length = torch.full_like(last, context) if whole else last + 1
    length = length * present
    length[0] += ~present.any()  # see Packing.absent
    return length, torch.minimum(last, length - 1)


class TextBlock(nn.Module):
    """Pre-norm transformer block over packed tokens."""

    def __init__(self, recipe: TextRecipe, activation: str) -> None:
        super().__init__()
        width = recipe.width
        self.heads, self.causal = recipe.heads, recipe.causal
        self.norm1 = nn.LayerNorm(width, eps=recipe.norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=recipe.norm_eps)
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(recipe.dropout)

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
        """(T, width) packed tokens -> (T, width); with `ends_only` (K, width) at the pooled tokens."""
        mixed = self._attend(packing.spread(self.qkv(self.norm1(x))))
        mixed = packing.gather(mixed)
        if ends_only:  # keys and values of the others are used above; nothing else of them is
            x, mixed = x.index_select(0, packing.end), mixed.index_select(0, packing.end)
        x = x + self.drop(self.proj(mixed))
        return x + self.drop(self.fc2(self.act(self.fc1(self.norm2(x)))))

    def _attend(self, qkv: Tensor) -> Tensor:
        captions, longest, _ = qkv.shape
        q, k, v = qkv.view(captions, longest, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # (K, heads, L, width / heads)
        return mixed.transpose(1, 2).flatten(2)


class TextTower(nn.Module):
    """Tokens -> embedding: CLIP's tower (Radford et al. 2021, §2.4), SigLIP's (Zhai et al. 2023), or one pooled by the
    maximum over the caption's tokens (PyramidCLIP, Gao et al. 2022)."""

    def __init__(self, recipe: TextRecipe, embed_dim: int, activation: str) -> None:
        super().__init__()
        self.context, self.pool = recipe.context, recipe.pool
        self.reads_padding = not recipe.causal or recipe.pool == "last"
        self.token_embedding = nn.Embedding(recipe.vocab, recipe.width)
        self.positional_embedding = nn.Parameter(torch.empty(recipe.context, recipe.width))
        self.drop = nn.Dropout(recipe.dropout)
        self.blocks: Any = nn.ModuleList(
            TextBlock(recipe, recipe.activation or activation) for _ in range(recipe.layers)
        )
        self.norm = nn.LayerNorm(recipe.width, eps=recipe.norm_eps)
        self.projection = nn.Linear(recipe.width, embed_dim, bias=recipe.projection_bias)
        self.init()

    def init(self) -> None:
        """CLIP's initialisation (as in open_clip: the deeper, the smaller what a block adds at the start)."""
        width = self.projection.in_features
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.blocks:
            block.init(width**-0.5 * (2 * len(self.blocks)) ** -0.5)
        nn.init.normal_(self.projection.weight, std=width**-0.5)
        if self.projection.bias is not None:
            nn.init.zeros_(self.projection.bias)

    def forward(self, tokens: Tensor, outputs: Collection[str] = ("embedding",)) -> dict[str, Tensor]:
        """(B, <= context) int64 ids -> the named outputs; end-of-text, where it is asked for, a row's highest id.

        `pooled` is (B, width), `embedding` its projection (B, embed_dim), not of unit length. A row of zeros is no
        text: its features are zero.

        Raises:
            UserError: captions longer than the tower's context, or shorter where the padding takes part.
        """
        if tokens.shape[1] > self.context or (self.reads_padding and tokens.shape[1] < self.context):
            raise UserError(
                f"captions of {tokens.shape[1]} tokens, but the text tower has a context of {self.context}; "
                f"tokenize with context {self.context}"
            )
        packing = Packing.of(tokens, whole=self.reads_padding, pool=self.pool)
        pooled = self._pooled(tokens, packing)  # (K, width)
        found = {"pooled": packing.restore(pooled)}
        if "embedding" in outputs:
            found["embedding"] = packing.restore(self.projection(pooled))
        return found

    def _pooled(self, tokens: Tensor, packing: Packing) -> Tensor:
        ids = packing.gather(tokens[packing.kept, : packing.longest, None]).flatten()
        positions = F.embedding(packing.place % packing.longest, self.positional_embedding)
        x = self.drop(self.token_embedding(ids) + positions)  # (T, width)
        for block in self.blocks[:-1]:
            x = block(x, packing)
        if self.pool == "max":
            return packing.most(self.norm(self.blocks[-1](x, packing)))
        return self.norm(self.blocks[-1](x, packing, ends_only=True))
