"""CLIP and SigLIP as objectives: several captions an image, what each sample's loss is, what is learned beside it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pretrain.objectives import build
from pretrain.objectives.functional import clip_loss, siglip_loss
from pretrain.objectives.pieces.pairs import PairObjective
from pretrain.reader import Batch
from pretrain.replay import replay
from pretrain.telemetry import read_log
from tests.runs import train, train_here, weights
from tests.tiny import FACTS, recipe_data, write_recipe, write_shards

ROWS, CAPTIONS = 20, 3
NAMES = ("clip", "siglip")


def objective(name: str, **options) -> PairObjective:
    return build({name: options}, FACTS)[name].double()


def batch() -> Batch:
    """Two rows of one sample, one damaged row, and captions that some rows lack; the last, all but two."""
    ids, weight = torch.arange(ROWS), torch.ones(ROWS)
    ids[5], weight[7] = ids[11], 0
    present = {"caption+1": torch.arange(ROWS) % 3 > 0, "caption+2": torch.arange(ROWS) < 2}
    return Batch(
        step=0,
        ids=ids,
        source=torch.zeros(ROWS, dtype=torch.int64),
        epoch=torch.zeros(ROWS, dtype=torch.int64),
        keys=[str(i) for i in range(ROWS)],
        weight=weight,
        labels=torch.full((ROWS,), -1),
        images={},
        tokens={},
        captions={},
        present=present,
    )


def features(asked: PairObjective) -> dict:
    """Random features, not of unit length; those of captions that are absent are zero, as the text tower gives them."""
    g = torch.Generator().manual_seed(0)
    found = {r: torch.randn(ROWS, 8, generator=g, dtype=torch.float64) for r in asked.requests()}
    for request in asked.texts[1:]:
        found[request][~batch().present[request.view]] = 0
    return {r: f.requires_grad_() for r, f in found.items()}


def by_hand(asked: PairObjective, given: dict) -> torch.Tensor:
    """The mean over captions of the loss of the rows that have them, one caption after another."""
    terms, b = [], batch()
    for request in asked.texts:
        rows = (b.weight > 0) & b.present.get(request.view, torch.ones(ROWS, dtype=torch.bool))
        image, text = (F.normalize(given[r][rows], dim=1) for r in (asked.image, request))
        if hasattr(asked, "logit_bias"):
            terms.append(siglip_loss(image, text, asked.logit_scale, asked.logit_bias, ids=b.uid[rows]))
        else:
            terms.append(clip_loss(image, text, asked.logit_scale, ids=b.uid[rows], smoothing=asked.options.smoothing))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("captions", [1, CAPTIONS])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_mean_over_captions_of_the_rows_that_have_one(name, captions):
    asked = objective(name, captions=captions)
    given, expected = features(asked), features(asked)
    found = asked.loss(given, batch(), None).value
    wanted = by_hand(asked, expected)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    learned = list(asked.parameters())
    got = torch.autograd.grad(found, [*given.values(), *learned])
    for gradient, correct in zip(got, torch.autograd.grad(wanted, [*expected.values(), *learned]), strict=True):
        torch.testing.assert_close(gradient, correct, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("captions", [1, CAPTIONS])
@pytest.mark.parametrize("name", NAMES)
def test_the_samples_own_losses_have_the_loss_as_their_mean(name, captions):
    asked, b = objective(name, captions=captions), batch()
    own = asked.sample_losses(features(asked), b)
    assert own[b.weight == 0].eq(0).all()
    loss = asked.loss(features(asked), b, None).value
    torch.testing.assert_close(own.sum() / b.weight.sum(), loss, rtol=1e-10, atol=0)


def test_one_caption_asks_for_no_more_than_it_ever_did():
    asked = objective("clip")
    assert [v.name for v in asked.text_views()] == ["caption"]
    assert [(v.name, v.after) for v in objective("siglip", captions=3).text_views()] == [
        ("caption", 0), ("caption+1", 1), ("caption+2", 2),
    ]  # fmt: skip


def test_temperature_and_bias_start_where_the_papers_have_them_and_stay_in_bounds():
    clip, siglip = objective("clip"), objective("siglip")
    assert clip.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert siglip.logit_scale.exp().item() == pytest.approx(10.0, rel=1e-6)
    assert siglip.logit_bias.item() == -10.0
    for asked in (clip, siglip):
        asked.logit_scale.data.fill_(5.0)
        asked.after_step(0)
        assert asked.logit_scale.item() == pytest.approx(math.log(100))
    siglip.logit_bias.data.fill_(-30.0)
    siglip.after_step(0)
    assert siglip.logit_bias.item() == -30.0
    signals = siglip.loss(features(siglip), batch(), None).signals
    assert signals["logit_bias"].item() == -30.0
    assert signals["logit_scale"].item() == pytest.approx(100.0)


# ----------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Two captions a sample."""
    return write_shards(tmp_path_factory.mktemp("shards"))


def run(shards: Path, folder: Path, name: str, objectives: dict, **changes) -> Path:
    return write_recipe(folder / f"{name}.yaml", recipe_data(shards, folder / name, objectives=objectives, **changes))


def test_captions_are_read_trained_on_and_replayed(tmp_path, shards):
    """Two ranks, two micro-batches; of the three captions asked for, samples have two."""
    objectives = {"clip": {"captions": 3}, "siglip": {"captions": 2, "weight": 0.1}}
    train(str(run(shards, tmp_path, "run", objectives, world=2, accumulation=2, steps=4, checkpoint={"every": 1})))
    logged = {line["step"]: line["loss"] for line in read_log(tmp_path / "run")}
    replayed = replay(tmp_path / "run", 4)
    assert float(replayed.total().mean()) == pytest.approx(logged[4], rel=1e-5)
    first, second = (replayed.batch.captions[view] for view in ("caption", "caption+1"))
    assert all(a != b and b for a, b in zip(first, second))
    assert not replayed.batch.present["caption+2"].any()


def test_siglip_resumes_bit_for_bit(tmp_path, shards):
    changes = {"schedule": {"final": 1.0}}
    assert train_here(run(shards, tmp_path, "whole", {"siglip": 1.0}, steps=6, **changes)) == 0
    for steps in (3, 6):
        assert train_here(run(shards, tmp_path, "cut", {"siglip": 1.0}, steps=steps, **changes)) == 0
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole["objective.siglip.logit_bias"].item() != -10.0
    assert [n for n in whole if not torch.equal(whole[n], cut[n])] == []
