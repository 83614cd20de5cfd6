"""CLIP's byte-pair tokenizer over the vocabulary file that open_clip_torch ships.

Token for token the same as `open_clip.tokenizer.SimpleTokenizer` (Radford et al. 2021), which keeps every
word it ever saw: on a web-scale run that cache only grows. Here the words and the captions are kept in
bounded LRU caches (captions as two bytes a token), plain ASCII skips ftfy (which leaves such text as it is),
and of open_clip only the vocabulary file is read (importing it costs a third of a second). A word is read up
to its 4,096th byte, since merging costs the square of its length. No decoding back to text, no other
vocabulary.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.util
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import ftfy
import numpy as np
import regex
import torch

from pretrain.errors import UserError

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
VOCAB_SIZE = 49408
START, END = VOCAB_SIZE - 2, VOCAB_SIZE - 1
LONGEST_WORD = 4096  # bytes: half a second of merging at the most
_RULES = "clean=ftfy,html,whitespace,lower;truncate=eot-last;1"  # raised when the tokens of any text change
_SPECIAL = {"<start_of_text>": START, "<end_of_text>": END}
_WORDS = regex.compile(
    "|".join(_SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


class ClipTokenizer:
    """Captions -> (B, context) int64: start, the caption's tokens, end, then zeros; cut to fit, the end kept.

    Safe to call from several threads. Memory is bounded by `cached` captions and four times as many words.
    """

    name = "clip-bpe-49408"
    vocab_size = VOCAB_SIZE

    def __init__(self, context: int = 77, *, cached: int = 16384) -> None:
        if context < 2:
            raise ValueError(f"context {context} leaves no room for the start and end tokens; give at least 2")
        self.context = context
        self._vocabulary = _vocabulary_path().read_bytes()
        self._letters = _byte_letters()
        self._ranks, self._ids = _read_vocabulary(self._vocabulary, list(self._letters.values()))
        self._caption = lru_cache(maxsize=cached)(self._encode_caption)
        self._word = lru_cache(maxsize=4 * cached)(self._encode_word)

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        return rectangle(self._caption, captions, self.context, pad=0)

    def digest(self) -> str:
        """sha256 of all that decides which tokens a caption gets."""
        rules = f"{self.name} {_RULES} context={self.context} ".encode()
        return hashlib.sha256(rules + gzip.decompress(self._vocabulary)).hexdigest()

    def vocabulary(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """Ids of the pieces and the merges, best first: what other programs make this tokenizer of."""
        return self._ids, list(self._ranks)

    def _encode_caption(self, caption: str) -> array:
        ids = array("H", [START])
        for word in _WORDS.findall(clean(caption)):
            ids.extend(self._word(word))
            if len(ids) >= self.context:
                break
        del ids[self.context - 1 :]
        ids.append(END)
        return ids

    def _encode_word(self, word: str) -> array:
        if word in _SPECIAL:
            return array("H", [_SPECIAL[word]])
        letters = [self._letters[byte] for byte in word.encode("utf-8")[:LONGEST_WORD]]
        letters[-1] += "</w>"
        return array("H", [self._ids[piece] for piece in self._merge(letters)])

    def _merge(self, pieces: list[str]) -> list[str]:
        """Join the best-ranked neighbouring pair, everywhere, until no pair has a rank."""
        while len(pieces) > 1:
            best = min(pairwise(pieces), key=self._rank)
            if best not in self._ranks:
                break
            pieces = _join(pieces, best)
        return pieces

    def _rank(self, pair: tuple[str, str]) -> int:
        return self._ranks.get(pair, VOCAB_SIZE)


def rectangle(
    ids_of: Callable[[str], Sequence[int] | np.ndarray], captions: Sequence[str], context: int, pad: int
) -> torch.Tensor:
    """(B, context) int64: each caption's ids, no more than `context`, and `pad` behind them."""
    tokens = np.full((len(captions), context), pad, dtype=np.int64)
    for row, caption in zip(tokens, captions):
        ids = ids_of(caption)
        row[: len(ids)] = ids
    return torch.from_numpy(tokens)


def clean(text: str) -> str:
    """Mojibake and HTML entities repaired, white space collapsed, lower case; half a surrogate pair is a `?`."""
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = text.encode("utf-8", "replace").decode("utf-8")
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _join(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    joined, i = [], 0
    while i < len(pieces):
        both = (pieces[i], pieces[i + 1]) == pair if i + 1 < len(pieces) else False
        joined.append(pair[0] + pair[1] if both else pieces[i])
        i += 2 if both else 1
    return joined


def _vocabulary_path() -> Path:
    spec = importlib.util.find_spec("open_clip")  # finds the package without importing it
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / VOCABULARY).is_file():
            return path
    raise UserError(f"the tokenizer's vocabulary {VOCABULARY} was not found; install it: pip install open_clip_torch")


def _byte_letters() -> dict[int, str]:
    """Every byte as a visible letter, in the order of the vocabulary: printable bytes first, the rest from
    256 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible}
    return letters | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def _read_vocabulary(file: bytes, letters: list[str]) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    """Rank of every merge and id of every piece."""
    lines = gzip.decompress(file).decode("utf-8").split("\n")
    merges = [(first, second) for first, second in map(str.split, lines[1 : VOCAB_SIZE - 2 - 512 + 1])]
    pieces = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(first + second for first, second in merges),
    ]
    return {pair: rank for rank, pair in enumerate(merges)}, {piece: i for i, piece in enumerate(pieces)}
