"""Captions into tokens: what a tokenizer is, and which one a recipe's text tower has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from pretrain.errors import UserError
from pretrain.recipe.model import TextRecipe
from pretrain.views.pieces import PieceTokenizer
from pretrain.views.tokenizer import ClipTokenizer


class Tokenizer(Protocol):
    """Captions -> (B, context) int64; safe to call from several threads."""

    context: int
    vocab_size: int

    def __call__(self, captions: Sequence[str]) -> torch.Tensor: ...

    def digest(self) -> str:
        """sha256 of all that decides which tokens a caption gets."""


def build_tokenizer(text: TextRecipe | None) -> Tokenizer | None:
    """The tokenizer of a recipe's text tower; None where it has none.

    Raises:
        UserError: its file cannot be used, or has more tokens than the tower.
    """
    if text is None:
        return None
    built: Tokenizer = ClipTokenizer(text.context)
    if text.tokenizer is not None:
        built = PieceTokenizer(text.tokenizer, text.context)
    if built.vocab_size > text.vocab:
        raise UserError(
            f"model.text.vocab is {text.vocab}, but the tokenizer has {built.vocab_size} tokens: set it to that, "
            "or model.text.tokenizer to the file that the weights came with"
        )
    return built
