"""CLIP's tokenizer as a `tokenizer.json`, which Hugging Face's `tokenizers` and transformers read.

Token for token ours, but that HTML entities and mojibake are left as they are, as transformers' CLIPTokenizer does.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pretrain.errors import UserError
from pretrain.recipe import ModelRecipe
from pretrain.views.tokenizer import END, START, ClipTokenizer

WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
FIRST, LAST = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(model: ModelRecipe, folder: Path) -> None:
    """`tokenizer.json`, which pads and cuts to the context, and `tokenizer_config.json`; a copy of the recipe's own
    tokenizer, where it has one; nothing without a text tower.

    Raises:
        UserError: the package tokenizers is not installed.
    """
    if model.text is None:
        return
    if model.text.tokenizer:
        shutil.copy(model.text.tokenizer, folder)
        return
    try:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    except ImportError as missing:
        raise UserError(f"{missing}; pip install 'polyview[export]'") from None
    pieces, merges = ClipTokenizer().vocabulary()
    vocabulary = pieces | {FIRST: START, LAST: END}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=LAST))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.post_processor = processors.RobertaProcessing((LAST, END), (FIRST, START), False, False)
    tokenizer.enable_truncation(model.text.context)
    tokenizer.enable_padding(length=model.text.context, pad_id=0, pad_token="!")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": model.text.context,
        "bos_token": FIRST, "eos_token": LAST, "unk_token": LAST, "pad_token": LAST,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
