"""Every class alike, every sample of it once an epoch, the same batch at any world, through reader and trainer too."""

from __future__ import annotations

import json
import logging
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.__main__ import main
from pretrain.checkpoint import find_latest
from pretrain.data import open_data
from pretrain.errors import UserError
from pretrain.order import BALANCED_VERSION, BalancedOrder, SampleOrder
from pretrain.order.lines import chunks
from pretrain.reader import Reader
from pretrain.recipe import parse_recipe
from pretrain.telemetry import read_log
from pretrain.views.spec import ImageView
from tests.tiny import add, picture, recipe_data, write_recipe, write_shards


def mixed_labels(sizes, seed=0):
    """Class c for `sizes[c]` samples, shuffled."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    np.random.default_rng(seed).shuffle(labels)
    return labels


def order_of(labels, classes_per_batch=3, each=4, seed=0):
    return BalancedOrder(
        [np.asarray(labels)], seed=seed, global_batch=classes_per_batch * each, classes_per_batch=classes_per_batch
    )


# ---- exactness -------------------------------------------------------------------------------------------

SETTINGS = [
    ([30] * 7, 3, 4),  # rounds of 7 classes and batches of 3 never fit
    ([5, 9, 17, 31, 100], 2, 4),  # uneven classes
    ([9] * 5, 4, 5),  # fewer than 2 P - 1 classes, fewer than 2 K - 1 samples in each
    ([12] * 6, 6, 6),  # all classes in each batch
    ([13] * 11, 1, 6),
    ([8] * 9, 5, 1),
    ([1, 2, 3, 50, 4], 3, 4),  # smaller than K
]


@pytest.mark.parametrize(("sizes", "classes_per_batch", "each"), SETTINGS)
def test_classes_are_alike_and_samples_exact(sizes, classes_per_batch, each):
    labels = mixed_labels(sizes)
    order, steps = order_of(labels, classes_per_batch, each), 40 * len(sizes)
    visits, seen = np.zeros((steps, len(sizes)), int), Counter()
    for step in range(steps):
        batch = order.batch(step)
        counts = np.bincount(labels[batch.ids], minlength=len(sizes))
        assert sorted(counts[counts > 0]) == [each] * classes_per_batch
        visits[step] = counts > 0
        seen.update(zip(batch.ids.tolist(), batch.epoch.tolist()))
    assert (visits.sum(0) == 40 * classes_per_batch).all()  # P / C of the time
    assert np.ptp(visits.cumsum(0), axis=1).max() <= 1  # and so at every step: none is lost or doubled in a round
    assert set(seen.values()) == {1}  # a sample that comes again has another epoch
    for c, size in enumerate(sizes):
        epochs = Counter(epoch for id, epoch in seen if labels[id] == c)
        assert all(epochs[epoch] == size for epoch in range(max(epochs)))


def test_exact_over_many_random_settings():
    draw = np.random.default_rng(1)
    for seed in range(40):
        sizes = draw.integers(1, 25, int(draw.integers(1, 12)))
        classes_per_batch, each = int(draw.integers(1, len(sizes) + 1)), int(draw.integers(1, 7))
        labels = mixed_labels(sizes, seed)
        order = order_of(labels, classes_per_batch, each, seed)
        for step in range(15):
            batch = order.batch(step)
            for c in (found := np.unique(labels[batch.ids])):
                times = np.unique(batch.ids[labels[batch.ids] == c], return_counts=True)[1]
                assert times.sum() == each
                assert times.max() <= -(-each // sizes[c])  # twice in a batch only where it must be
            assert len(found) == classes_per_batch


def test_each_round_and_epoch_has_an_order_of_its_own():
    keys = np.array([7], np.uint64)
    rounds = [chunks(np.array([n]), np.array([50]), 50, keys)[0][0] for n in range(6)]
    assert all(sorted(r) == list(range(50)) for r in rounds)
    assert max((a == b).mean() for i, a in enumerate(rounds) for b in rounds[:i]) < 0.2


def test_any_two_classes_meet_equally_often():
    """Also over the edges of rounds, where classes are swapped so that none is twice in a batch."""
    classes, width, steps = 11, 5, 6000
    found, _ = chunks(np.arange(steps), np.full(steps, classes), width, np.full(steps, 3, np.uint64))
    present = np.zeros((steps, classes))
    np.put_along_axis(present, found, 1, axis=1)
    assert (present.sum(1) == width).all()
    together = (present.T @ present)[np.triu_indices(classes, 1)]
    expected = steps * width * (width - 1) / (classes * (classes - 1))
    assert np.abs(together / expected - 1).max() < 0.12


def test_columns_are_a_part_of_the_chunk():
    arguments = np.arange(40), np.arange(40) % 9 + 1, 4, np.arange(40, dtype=np.uint64)
    whole, part = chunks(*arguments), chunks(*arguments, np.array([2, 3]))
    assert all(np.array_equal(w[:, 2:], p) for w, p in zip(whole, part))


# ---- ranks and resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_worlds_share_one_global_batch_and_its_classes(world):
    labels = mixed_labels([20, 30, 40, 50, 60])
    order = order_of(labels, classes_per_batch=3, each=8)
    for step in (0, 1, 7, 501):
        parts = [order.batch(step, rank, world) for rank in range(world)]
        for whole, column in zip(order.batch(step), zip(*parts)):
            assert np.array_equal(whole, np.concatenate(column))
        for part in parts:
            counts = np.bincount(labels[part.ids])
            assert np.ptp(counts[counts > 0]) <= 1
            assert (counts > 0).sum() == 3


def test_a_cold_step_equals_the_stream():
    labels = mixed_labels([7, 30, 11, 5, 90, 8])
    warm = order_of(labels, 4, 3)
    stream = [warm.batch(step) for step in range(1001)]
    for step in (1000, 999, 17, 0):
        assert all(np.array_equal(a, b) for a, b in zip(order_of(labels, 4, 3).batch(step), stream[step]))


def test_a_class_of_several_sources_is_one_class():
    labels = mixed_labels([30, 40, 50])
    one = order_of(labels, 2, 5)
    two = BalancedOrder([labels[:37], labels[37:]], seed=0, global_batch=10, classes_per_batch=2)
    for step in range(20):
        a, b = one.batch(step), two.batch(step)
        assert set(b.source) <= {0, 1}
        assert np.array_equal(a.ids, b.ids + np.where(b.source == 1, 37, 0))
    assert [column.dtype for column in b] == [np.int64, np.int32, np.int64]


def test_order_is_golden():
    """Whoever changes these figures raises BALANCED_VERSION: runs in progress would go on with other batches."""
    assert BALANCED_VERSION == 1
    order = BalancedOrder([np.arange(500) * 7 % 10 % 6], seed=11, global_batch=12, classes_per_batch=4)
    assert [order.batch(step).ids.tolist() for step in (0, 1, 400)] == [
        [333, 380, 352, 16, 273, 200, 422, 384, 281, 70, 312, 446],
        [375, 207, 421, 468, 365, 309, 31, 310, 395, 277, 493, 430],
        [129, 4, 483, 135, 149, 394, 291, 5, 347, 104, 181, 335],
    ]
    assert order.batch(400).epoch.tolist() == [7, 7, 8, 16, 7, 7, 8, 16, 8, 8, 8, 16]
    assert order.digest() == "89bbb49f53b1b407b48d318ebb217e20fb9b42b7a1bb1ecd052997ddec1cc84b"


def test_digest_and_resume_tell_every_setting_apart():
    labels = mixed_labels([20, 30, 40, 50])
    settings = {"seed": 0, "global_batch": 12, "classes_per_batch": 2}
    order = BalancedOrder([labels], **settings)
    saved = json.loads(json.dumps(order.description()))
    order.check_continues(saved, 50)
    assert BalancedOrder([labels], **settings).digest() == order.digest()
    for name, other in {
        "seed": BalancedOrder([labels], **settings | {"seed": 1}),
        "global_batch": BalancedOrder([labels], **settings | {"global_batch": 24}),
        "classes_per_batch": BalancedOrder([labels], **settings | {"classes_per_batch": 3}),
        "sources": BalancedOrder([np.where(np.arange(140) == 3, 0, labels)], **settings),
    }.items():
        assert other.digest() != order.digest()
        with pytest.raises(UserError, match=f"up to step 50: .*{name} was"):
            other.check_continues(saved, 50)


def test_a_plain_run_cannot_go_on_balanced_nor_the_other_way():
    balanced, plain = order_of([0, 1] * 20, 2, 2), SampleOrder([[40]], seed=0, global_batch=4)
    with pytest.raises(UserError, match="classes_per_batch was None and is 2"):
        balanced.check_continues(plain.description(), 5)
    with pytest.raises(UserError, match="classes_per_batch was 2 and is None"):
        plain.check_continues(balanced.description(), 5)


# ---- what is left out, warned of, refused ----------------------------------------------------------------


def test_samples_without_a_class_are_left_out_and_counted(caplog):
    labels = mixed_labels([20, 20, 20])
    labels[::4] = -1
    order = order_of(labels, 3, 2)
    assert "15 of 60 samples have no class" in caplog.text
    assert order.samples == 45
    assert order.epoch_of(15) == 2.0
    assert (labels[np.concatenate([order.batch(step).ids for step in range(60)])] >= 0).all()


def test_small_classes_are_warned_of_once(caplog):
    with caplog.at_level(logging.WARNING):
        order_of(mixed_labels([4, 4]), 2, 4)
        assert not caplog.records
        order_of([8, 8, 8, 9, *[2] * 4], 2, 4)
    assert [record.message for record in caplog.records] == [
        "class 8 has fewer samples (3) than the 4 it gives to a batch, as does one other class: "
        "they repeat within a batch"
    ]


@pytest.mark.parametrize(
    ("classes_per_batch", "global_batch", "message"),
    [
        (5, 12, "divide global_batch 12 and be at most the 7 classes there are; try 4 or 6"),
        (12, 12, "at most the 7 classes there are; try 6"),
        (0, 12, "try 1"),
        (3, 0, "at least 1"),
    ],
)
def test_classes_a_batch_that_cannot_be_are_refused_with_what_works(classes_per_batch, global_batch, message):
    with pytest.raises(UserError, match=message):
        BalancedOrder([np.arange(70) % 7], seed=0, global_batch=global_batch, classes_per_batch=classes_per_batch)


def test_no_class_at_all_is_refused_with_what_to_do():
    with pytest.raises(UserError, match=r"data.classes_per_batch: none of the 9 samples has a class .* Pack"):
        order_of(np.full(9, -1))


def test_callers_mistakes_are_refused():
    order = order_of([0, 1, 2] * 10)
    with pytest.raises(UserError, match="12 does not divide among 5 ranks"):
        order.batch(0, 0, 5)
    with pytest.raises(ValueError, match="step"):
        order.batch(-1)
    with pytest.raises(ValueError, match="labels of source 0"):
        order_of([0.5])


# ---- through the reader and the trainer ------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("balanced"))


def balanced(shards: Path, output: Path, **changes) -> dict:
    data = {"sources": [str(shards)], "classes_per_batch": 2} | changes.pop("data", {})
    return recipe_data(shards, output, data=data, **changes)


@pytest.mark.parametrize("budget", [0, 1 << 30])  # samples read singly; all of them held
@pytest.mark.parametrize("world", [1, 2])
def test_the_reader_gives_the_classes_of_the_order(shards, tmp_path, world, budget):
    sources, order = open_data(parse_recipe(balanced(shards, tmp_path), "test"))
    steps = []
    for rank in range(world):
        views = (ImageView("image", 16),)
        with Reader(sources, order, views, (), None, seed=0, rank=rank, world=world, cache_bytes=budget) as reader:
            assert reader.blocks.whole == bool(budget)
            steps.append(list(reader.stream(0, 12)))
            assert not budget or reader.blocks.bytes_read < 2 * sum(tar.stat().st_size for tar in shards.glob("*.tar"))
    for step, parts in enumerate(zip(*steps)):
        labels = torch.cat([part.labels for part in parts])
        assert torch.equal(labels, torch.cat([part.ids for part in parts]) % 3)  # as tiny shards are labelled
        assert sorted(torch.bincount(labels, minlength=3).tolist()) == [0, 6, 6]
        assert np.array_equal(torch.cat([part.ids for part in parts]), order.batch(step).ids)


def test_jumping_among_many_shards_loads_each_index_once(tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "data", samples=300, shards=290)  # more than are kept in the plain order
    sources, order = open_data(parse_recipe(balanced(shards, tmp_path), "test"))
    with Reader(sources, order, (), (), None, seed=0, cache_bytes=0) as reader:
        list(reader.stream(0, 60))  # twice all samples
        loaded: list[Path] = []
        monkeypatch.setattr("pretrain.shards.source.load_index", loaded.append)
        list(reader.stream(60, 90))
    assert loaded == []


def test_the_recipe_refuses_what_would_contradict_it(shards, tmp_path):
    weighted = [{"shards": str(shards), "weight": 1.0}, {"shards": str(shards), "weight": 2.0}]
    for data, message in [
        ({"sources": weighted}, "take data.sources weight out"),
        ({"segments": [{"from_step": 5, "weights": [1.0]}], "block": 8}, "data.segments and data.block"),
        ({"classes_per_batch": 5}, "must divide global_batch 12 and be at most the 3 classes"),
    ]:
        with pytest.raises(UserError, match=message):
            open_data(parse_recipe(balanced(shards, tmp_path, data=data), "test"))


def test_a_source_without_classes_is_refused_by_the_recipes_key(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(12):
            add(tar, f"s{i}.png", picture(i))
    with pytest.raises(UserError, match=r"data\.classes_per_batch: none of the 12 samples"):
        open_data(parse_recipe(balanced(tmp_path / "0.tar", tmp_path), "test"))


def test_a_balanced_run_resumes_exactly_and_refuses_other_classes(shards, tmp_path, capsys):
    constant = {"final": 1.0}  # a learning rate that does not depend on the number of steps
    whole, cut = (
        write_recipe(tmp_path / f"{name}.yaml", balanced(shards, tmp_path / name, schedule=constant))
        for name in ("whole", "cut")
    )
    assert main([str(whole)]) == 0
    assert main([str(cut), "steps=4"]) == 0
    assert main([str(cut), "data.classes_per_batch=3"]) == 2
    assert "data.classes_per_batch: 2 -> 3" in capsys.readouterr().err
    assert main([str(cut)]) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def losses(run: Path) -> dict[int, float]:
    assert find_latest(run / "checkpoints").step == 8
    return {line["step"]: line["loss"] for line in read_log(run / "log.jsonl")}
