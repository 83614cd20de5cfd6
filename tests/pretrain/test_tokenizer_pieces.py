"""SigLIP's tokenizer gives transformers' and open_clip's tokens, from either kind of file; other files are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from open_clip import IMAGENET_CLASSNAMES
from open_clip.tokenizer import _clean_canonicalize
from pydantic import ValidationError
from tokenizers import SentencePieceUnigramTokenizer
from transformers import PreTrainedTokenizerFast, SiglipTokenizer

from pretrain.encoder import Encoder, load
from pretrain.errors import UserError
from pretrain.models.trunk import build_trunk
from pretrain.recipe import ModelRecipe, TextRecipe
from pretrain.replay import replay
from pretrain.views.pieces import PAD, PieceTokenizer, canonical
from pretrain.views.text import build_tokenizer
from pretrain.views.tokenizer import ClipTokenizer
from tests.pretrain.test_tokenizer import TEXTS
from tests.runs import losses, train_here
from tests.tiny import recipe_data, write_recipe, write_shards

CORPUS = [f"a photo of a {name.lower()}" for name in IMAGENET_CLASSNAMES]
CAPTIONS = [
    "",
    "A red dog!",
    "Two people, in COATS -- watch (the) dog.",
    "grass " * 100,
    "unseen zebra words 123",
    "caf\u00e9 \u65e5\u672c",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with T5's special tokens, as SigLIP's is."""
    prefix = tmp_path_factory.mktemp("pieces") / "spiece"
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(prefix), vocab_size=400, minloglevel=2, **special
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def json_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("json") / "tokenizer.json"
    trained = SentencePieceUnigramTokenizer()
    trained.train_from_iterator(CORPUS, vocab_size=400, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    trained.enable_padding(length=5)  # what a file says of lengths is not what the recipe says
    trained.save(str(file))
    return file


def siglip(file: Path, **changes: int) -> TextRecipe:
    size = {"width": 16, "layers": 1, "heads": 2, "vocab": 400} | changes
    return TextRecipe(**size, context=64, causal=False, pool="last", tokenizer=file)


@pytest.mark.parametrize("context", [6, 64])
def test_same_tokens_as_transformers(model: Path, context: int) -> None:
    peer = SiglipTokenizer(str(model), model_max_length=context)
    wanted = peer(CAPTIONS, padding="max_length", truncation=True, max_length=context, return_tensors="pt").input_ids
    ours = PieceTokenizer(model, context)
    assert torch.equal(ours(CAPTIONS), wanted)
    assert torch.equal(ours(CAPTIONS), wanted), "from the cache"


def test_same_tokens_as_transformers_fast_files_in_open_clip(json_file: Path) -> None:
    peer = PreTrainedTokenizerFast(tokenizer_file=str(json_file), pad_token="</s>", eos_token="</s>")
    texts = [_clean_canonicalize(text) for text in CAPTIONS + TEXTS]
    ids = [row[:63] for row in peer(texts, add_special_tokens=False).input_ids]
    wanted = torch.tensor([[*row, 1, *[PAD] * (63 - len(row))] for row in ids])
    assert torch.equal(PieceTokenizer(json_file)(CAPTIONS + TEXTS), wanted)


def test_texts_are_cleaned_as_open_clip_cleans_them() -> None:
    for text in [*CAPTIONS, *TEXTS, "snake_case  __x__ a.b", "don't [it] {is}"]:
        assert canonical(text) == _clean_canonicalize(text), text


def test_a_recipe_chooses_and_its_file_is_part_of_the_encoder(model: Path, json_file: Path, tmp_path: Path) -> None:
    assert build_tokenizer(None) is None
    assert isinstance(build_tokenizer(TextRecipe()), ClipTokenizer)
    moved = tmp_path / "moved.model"
    moved.write_bytes(model.read_bytes())
    prints = []
    for file in (model, moved, json_file):
        recipe = ModelRecipe(
            image="vit_xsmall_patch16_clip_224", image_size=32, image_kwargs={"depth": 1}, embed_dim=16,
            text=siglip(file),
        )  # fmt: skip
        encoder = Encoder(build_trunk(recipe, seed=0), recipe, device="cpu")
        assert encoder.encode_text(["a red dog", ""]).shape == (2, 16)
        prints.append(encoder.fingerprint)
    assert prints[0] == prints[1], "the same file at another place"
    assert prints[0] != prints[2]


def test_what_cannot_be_used_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spiece.model").write_text("no model")
    (tmp_path / "tokenizer.json").write_text("{}")
    for file, why in (
        ("none.model", "cannot be read"),
        ("spiece.model", "no SentencePiece"),
        ("tokenizer.json", "is no"),
    ):
        with pytest.raises(UserError, match=rf"model\.text\.tokenizer: .*{file}.*{why}"):
            PieceTokenizer(tmp_path / file)
    with pytest.raises(UserError, match=r"model\.text\.vocab is 399, but the tokenizer has 400 tokens"):
        build_tokenizer(siglip(model, vocab=399))
    with pytest.raises(ValidationError, match="needs pool: last"):
        TextRecipe(tokenizer=model)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"pip install 'polyview\[siglip\]'"):
        PieceTokenizer(model)


def test_vocabularies_with_another_end_are_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(tmp_path / "other"), vocab_size=400, minloglevel=2
    )
    with pytest.raises(UserError, match="ends texts with token 2"):
        PieceTokenizer(tmp_path / "other.model")


def test_a_siglip_run_trains_resumes_and_encodes(model: Path, tmp_path: Path) -> None:
    towers = {
        "image": "vit_base_patch16_siglip_224",
        "image_size": 32,
        "image_kwargs": {"embed_dim": 16, "depth": 1, "num_heads": 2},
        "embed_dim": None,
        "text": siglip(model).model_dump(mode="json"),
    }
    shards = write_shards(tmp_path / "shards")
    data = recipe_data(shards, tmp_path / "run", steps=3, model=towers, objectives={"siglip": {}})
    recipe = write_recipe(tmp_path / "recipe.yaml", data)
    assert train_here(recipe) == 0
    assert train_here(recipe, "steps=4") == 0
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]
    assert load(tmp_path / "run", device="cpu").encode_text(["a photo of a dog"]).shape == (1, 16)
    assert replay(tmp_path / "run", 4).logged is not None
