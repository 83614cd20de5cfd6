"""Summaries of captions by rule, for who has no summariser: the rule's name is what a sample's JSON notes."""

from __future__ import annotations

import re
from collections.abc import Callable


def _first_sentence(caption: str) -> str:
    return re.split(r"(?<=[.!?])\s+", caption, maxsplit=1)[0]


def _first_20_words(caption: str) -> str:
    return " ".join(caption.split()[:20])


SUMMARIES: dict[str, Callable[[list[str]], list[str]]] = {
    "first-sentence": lambda captions: list(map(_first_sentence, captions)),
    "first-20-words": lambda captions: list(map(_first_20_words, captions)),
    "shortest-caption": lambda captions: [min(captions, key=len)],
}
"""All captions of a sample -> its summaries."""
