"""SigLIP's tokenizer: SentencePiece over text in lower case and without punctuation, from the weights' own file.

The text is cleaned as open_clip and big_vision clean it (`canonicalize`); Hugging Face's differs where a text has an
underscore, which it drops. The file is a SentencePiece model (`spiece.model`, read by the package sentencepiece) or a
`tokenizer.json` (by tokenizers, which comes with transformers); both packages are imported when one is opened.
SigLIP 2 has another vocabulary with other special tokens and is refused.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.errors import UserError
from pretrain.views.tokenizer import clean, rectangle

END = PAD = 1
_RULES = "clean=ftfy,html,lower,no-punctuation,whitespace;truncate=end-last;1"  # raised when any text's tokens change
_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


class PieceTokenizer:
    """Captions -> (B, context) int64: the caption's pieces, end, then padding, which is 1 as end is; cut, the end kept.

    Safe to call from several threads. Memory is bounded by `cached` captions.
    """

    name = "sentencepiece"

    def __init__(self, file: Path, context: int = 64, *, cached: int = 16384) -> None:
        """Raises UserError: no such file, not one of these vocabularies, or the package that reads it is missing."""
        try:
            self._vocabulary = file.read_bytes()
        except OSError as error:
            raise UserError(f"model.text.tokenizer: {file} cannot be read: {error.strerror}") from None
        self.context = context
        opened = _open_json if file.suffix == ".json" else _open_model
        self._pieces, self.vocab_size, end = opened(file, self._vocabulary)
        if end != END:
            raise UserError(
                f"model.text.tokenizer: {file} ends texts with token {end}; SigLIP's vocabularies with {END}"
            )
        self._caption = lru_cache(maxsize=cached)(self._encode_caption)

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        return rectangle(self._caption, captions, self.context, PAD)

    def digest(self) -> str:
        """sha256 of all that decides which tokens a caption gets."""
        rules = f"{self.name} {_RULES} context={self.context} ".encode()
        return hashlib.sha256(rules + self._vocabulary).hexdigest()

    def _encode_caption(self, caption: str) -> np.ndarray:
        return np.array([*self._pieces(canonical(caption))[: self.context - 1], END], dtype=np.int32)


def canonical(text: str) -> str:
    """Repaired, in lower case, without ASCII punctuation, underscores and white space as single spaces."""
    return " ".join(clean(text).translate(_NO_PUNCTUATION).split())


Opened = tuple[Callable[[str], list[int]], int, int | None]
"""Ids of a text without end, size of the vocabulary, id of end."""


def _open_model(file: Path, data: bytes) -> Opened:
    try:
        model = _package("sentencepiece").SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise UserError(f"model.text.tokenizer: {file} is no SentencePiece model: {error}") from None
    return model.encode, model.get_piece_size(), model.eos_id()


def _open_json(file: Path, data: bytes) -> Opened:
    try:
        model = _package("tokenizers").Tokenizer.from_str(data.decode())
    except Exception as error:  # the only type that tokenizers raises
        if isinstance(error, UserError):
            raise
        raise UserError(f"model.text.tokenizer: {file} is no tokenizer.json: {error}") from None
    model.no_truncation()
    model.no_padding()
    encode = lambda text: model.encode(text, add_special_tokens=False).ids
    return encode, model.get_vocab_size(), model.token_to_id("</s>")


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise UserError(
            f"model.text.tokenizer needs the package {name}, which is not installed: pip install 'polyview[siglip]'"
        ) from None
