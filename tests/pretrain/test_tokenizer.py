"""The tokenizer gives open_clip's tokens, in bounded memory."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from string import ascii_lowercase

import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from pretrain.views.tokenizer import END, START, ClipTokenizer, clean

TEXTS = [
    "",
    "   ",
    "A child in a pink dress is climbing up a set of stairs in an entry way .",
    "don't I'LL we'd they're 12345 3.14",
    "caf\u00e9 fianc\u00e9e \u00c0 LA CARTE \u0130stanbul Stra\u00dfe",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \U0001f389\U0001f389 \u2167 \u00b2\u00bd",
    "\ufb01ne \u201cquotes\u201d \u2014 dash",
    "\u00e2\u20ac\u0153mojibake\u00e2\u20ac\u009d",
    "&amp;lt;b&gt; a&nbsp;b &#x41;&amp;amp;",
    "tab\tnew\nline\r\x00\x07bell \x1b[31mred\x1b[0m",
    "<start_of_text> hi <END_OF_TEXT> there",
    "it\u017f 's 'S",
    "word " * 200,
    "x" * 3000,
]


def _noise(low: int, high: int, n: int) -> list[str]:
    rng = random.Random(low)
    return ["".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(40))) for _ in range(n)]


@pytest.fixture(scope="module")
def theirs() -> SimpleTokenizer:
    return SimpleTokenizer()


@pytest.mark.parametrize("context", [2, 5, 77])
def test_same_tokens_as_open_clip(theirs, context):
    texts = TEXTS + _noise(0, 128, 300) + _noise(0xA0, 0x2100, 300)
    ours = ClipTokenizer(context)
    assert torch.equal(ours(texts), theirs(texts, context_length=context))
    assert torch.equal(ours(texts), theirs(texts, context_length=context)), "from the caches"


@pytest.mark.real
def test_same_tokens_as_open_clip_on_real_captions(theirs, real_data):
    lines = (real_data / "flickr1k" / "captions.tsv").read_text().splitlines()[1:]
    captions = [line.split("\t")[1] for line in lines]
    assert len(captions) == 5000
    assert torch.equal(ClipTokenizer()(captions), theirs(captions))


def test_too_long_a_caption_is_cut_and_ends_with_the_end_token():
    tokens = ClipTokenizer(8)(["one two three four five six seven eight nine"])
    assert tokens.shape == (1, 8)
    assert tokens[0, 0] == START
    assert tokens[0, -1] == END


def test_no_captions_give_no_rows():
    assert ClipTokenizer()([]).shape == (0, 77)


def test_hostile_captions_cost_little_and_raise_nothing():
    letters = "".join(np.random.default_rng(0).choice(list(ascii_lowercase), 200_000))
    start = time.process_time()
    tokens = ClipTokenizer()([letters, "\udcff half of a pair", "\0"])
    assert time.process_time() - start < 5  # merging all of the word would take an hour
    assert (tokens == END).any(dim=1).all()


def test_caches_are_bounded():
    tokenizer = ClipTokenizer(cached=10)
    tokenizer([f"word{i} nonsense{i * i}" for i in range(200)])
    assert tokenizer._caption.cache_info().currsize == 10
    assert tokenizer._word.cache_info().currsize <= 40


def test_plain_text_that_skips_ftfy_is_what_ftfy_leaves_alone():
    import ftfy

    for text in _noise(0x20, 0x7F, 500):
        if "&" not in text:
            assert clean(text) == " ".join(ftfy.fix_text(text).split()).lower()


def test_digest_tells_tokenizers_apart():
    assert ClipTokenizer().digest() == ClipTokenizer().digest()
    assert ClipTokenizer().digest() != ClipTokenizer(64).digest()
    assert ClipTokenizer().vocab_size == 49408


def test_context_without_room_is_refused():
    with pytest.raises(ValueError, match="context 1"):
        ClipTokenizer(1)


def test_open_clip_is_not_imported():
    code = "import sys; from pretrain.views.tokenizer import ClipTokenizer as T; T()(['hi']); "
    code += "print('open_clip' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
