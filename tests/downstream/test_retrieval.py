"""Retrieval: known answers, ties by the stated rule, the five-caption convention, chance, any number of
ranks.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from downstream import retrieval
from tests.ranks import run_ranks


def unit(rows) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_set_with_known_answers() -> None:
    images = np.eye(3, dtype=np.float32)
    texts = unit([[1, 0, 0], [1, 2, 0], [0, 1, 0], [2, 1, 0], [0, 0, 1]])
    owner = np.array([0, 0, 1, 1, 2])
    found = retrieval.rank(images, texts, owner)
    assert found.image.tolist() == [1, 2, 1, 2, 1]
    assert found.text.tolist() == [1, 1, 1]
    figures = retrieval.metrics(found)
    assert figures["image_retrieval_recall@1"] == pytest.approx(0.6)
    assert figures["image_retrieval_recall@5"] == 1
    assert figures["text_retrieval_recall@1"] == 1
    assert figures["image_retrieval_median_rank"] == 1


def test_any_of_an_images_captions_counts_once() -> None:
    images = unit([[1, 0], [0, 1]])
    texts = unit([[0, 1], [0.1, 1], [1, 0.1], [1, 0.2]])  # image 0: one far and one near; image 1 likewise
    found = retrieval.rank(images, texts, np.array([0, 1, 0, 1]))
    assert found.text.tolist() == [1, 2]


def test_equal_images_rank_by_number() -> None:
    images = unit([[1, 0], [1, 0], [1, 0]])
    texts = unit([[1, 0], [1, 0], [1, 0]])
    found = retrieval.rank(images, texts, np.arange(3))
    assert found.image.tolist() == [1, 2, 3]
    assert found.text.tolist() == [1, 2, 3]


def test_images_without_captions_are_there_to_be_mistaken_for() -> None:
    images = unit([[1, 0], [1, 0.1], [0, 1]])
    texts = unit([[0, 1], [1, 0.1]])
    found = retrieval.rank(images, texts, np.array([2, 0]))
    assert found.image.tolist() == [1, 2]
    assert len(found.text) == 2
    assert found.images == 3


def scattered(seed: int = 0, n: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = unit(rng.normal(size=(n, 8)))
    owner = np.sort(rng.integers(0, n, 5 * n))
    return images, unit(images[owner] + rng.normal(size=(5 * n, 8))), owner


def test_ranks_are_those_of_the_full_matrix() -> None:
    images, texts, owner = scattered()
    found = retrieval.rank(images, texts, owner)
    scores = texts.astype(np.float64) @ images.T.astype(np.float64)
    assert np.array_equal(found.image, 1 + (scores > scores[np.arange(len(owner)), owner][:, None]).sum(1))
    best = [scores[owner == i, i].max() for i in np.unique(owner)]
    assert np.array_equal(found.text, [1 + (scores[:, i] > b).sum() for i, b in zip(np.unique(owner), best)])


def ranks_on(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    found = retrieval.rank(*scattered())
    return torch.from_numpy(found.image), torch.from_numpy(found.text)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_are_the_same_over_ranks(world: int) -> None:
    image, text = ranks_on(0, 1)
    for found_image, found_text in run_ranks(ranks_on, world):
        assert torch.equal(found_image, image)
        assert torch.equal(found_text, text)


def test_chance_is_what_random_vectors_reach() -> None:
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(60), rng.integers(1, 6, 60))
    expected = retrieval.chance(retrieval.Ranks(np.ones(len(owner)), np.ones(60), owner, 60))
    found: dict[str, list[float]] = {}
    for _ in range(60):
        images, texts = unit(rng.normal(size=(60, 16))), unit(rng.normal(size=(len(owner), 16)))
        for name, value in retrieval.metrics(retrieval.rank(images, texts, owner)).items():
            found.setdefault(name, []).append(value)
    for name, values in found.items():
        error = np.std(values) / np.sqrt(len(values)) if "recall" in name else 0.08 * expected[name]
        assert np.mean(values) == pytest.approx(expected[name], abs=4 * error), name


def test_captions_of_one_image_are_drawn_together() -> None:
    owner = np.repeat(np.arange(100), 5)
    hit = owner % 2 + 1  # an image's captions agree with each other: 100 draws, not 500
    found = retrieval.Ranks(hit, np.ones(100, int), owner, 100)
    low, high = retrieval.intervals(found)["image_retrieval_recall@1"]
    assert high - low == pytest.approx(2 * 1.96 * 0.05, rel=0.15)


def test_intervals_hold_the_figure_and_every_recall_has_one() -> None:
    found = retrieval.rank(*scattered())
    figures, ends = retrieval.metrics(found), retrieval.intervals(found)
    assert set(ends) == set(figures) == set(retrieval.chance(found))
    assert all(low <= figures[name] <= high for name, (low, high) in ends.items())
    assert ends == retrieval.intervals(found)
