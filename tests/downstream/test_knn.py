"""kNN classification: scikit-learn's answers, stated ties, and the corners where published code fails."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from downstream import knn
from downstream.classification import Answers, answer, chance, intervals, metrics
from downstream.knn import PROTOCOLS, Protocol
from pretrain.errors import UserError
from tests.ranks import run_ranks


def blobs(n: int, seed: int, classes: int = 7, spread: float = 1.2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, 16))
    labels = rng.integers(0, classes, n)
    vectors = centres[labels] + spread * rng.normal(size=(n, 16))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), labels


def run(test, bank, bank_labels, labels, protocol: Protocol, classes: int = 7) -> Answers:
    similarity, found = knn.nearest(test, bank, protocol.k)
    return knn.classify(similarity, bank_labels[found], labels, classes, classes, protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_answers_are_those_of_scikit_learn(protocol: Protocol) -> None:
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix  # slow to import on every rank
    from sklearn.neighbors import KNeighborsClassifier

    bank, bank_labels = blobs(500, 0)
    test, labels = blobs(130, 1)
    found = run(test, bank, bank_labels, labels, protocol)
    peer = KNeighborsClassifier(
        protocol.k,
        metric="cosine",
        algorithm="brute",
        weights=lambda d: np.exp((1 - d) / protocol.temperature),
    ).fit(bank, bank_labels)
    assert np.array_equal(found.predicted, peer.predict(test))
    assert 0.3 < metrics(found)["acc1"] < 1
    order = np.argsort(-peer.predict_proba(test), axis=1, kind="stable")
    ranks = 1 + np.argmax(order == labels[:, None], axis=1)
    assert metrics(found)["acc5"] == pytest.approx((ranks <= 5).mean(), abs=1e-12)
    assert metrics(found)["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, found.predicted))
    pairs, counts = found.confusion
    whole = np.zeros((7, 7), int)
    whole[tuple(pairs.T)] = counts
    assert np.array_equal(whole, confusion_matrix(labels, found.predicted, labels=range(7)))


def test_of_equal_votes_the_lower_class_wins() -> None:
    bank = np.eye(4, dtype=np.float32)[[0, 0, 1, 1]]
    test = np.full((1, 4), 0.5, np.float32)
    found = run(test, bank, np.array([3, 1, 2, 0]), np.array([2]), Protocol("k", 4, 0.07), 4)
    assert found.predicted[0] == 0
    assert found.ranks[0] == 3


def test_of_equally_near_images_the_first_votes() -> None:
    bank = np.eye(3, dtype=np.float32)[[1, 0, 0, 0]]
    test = np.eye(3, dtype=np.float32)[:1]
    found = run(test, bank, np.array([0, 2, 1, 1]), np.array([2]), Protocol("k", 1, 0.07), 3)
    assert found.predicted[0] == 2


def test_a_class_without_a_vote_is_not_among_the_five_best() -> None:
    scores = np.array([[0.0, 0, 0, 0, 0, 1.0]])
    assert answer(scores, np.array([0]), only_positive=True)[0][0] == 7
    assert answer(scores, np.array([0]))[0][0] == 2


def test_the_five_best_are_five() -> None:
    found = Answers(np.arange(1, 9), np.zeros(8, int), np.zeros(8, int), classes=8, size=8)
    assert metrics(found)["acc1"] == 1 / 8
    assert metrics(found)["acc5"] == 5 / 8


def test_small_sets_and_small_banks_work() -> None:
    bank, bank_labels = blobs(12, 0, classes=3)
    test, labels = blobs(5, 1, classes=3)
    found = run(test, bank, bank_labels, labels, Protocol("k200", 200, 0.1), 3)
    assert len(found.ranks) == 5
    assert metrics(found)["acc5"] is None
    assert "k200: only 12 training images, so k = 12" in knn.notes(bank_labels, labels)
    assert set(chance(3)) == {"acc1", "mean_per_class_recall"}


def test_classes_without_test_images_have_no_recall_and_stay_out_of_the_mean() -> None:
    found = Answers(np.array([1, 2, 1]), np.array([0, 2, 2]), np.array([0, 0, 2]), classes=4, size=4)
    assert found.recall.tolist()[0::2] == [0.5, 1.0]
    assert np.isnan(found.recall[[1, 3]]).all()
    assert metrics(found)["mean_per_class_recall"] == pytest.approx(0.75)
    assert "acc1" in intervals(found)


def test_notes_tell_of_unseen_classes_and_of_a_lopsided_bank() -> None:
    said = knn.notes(np.array([0] * 90 + [1] * 10), np.array([0, 5, 5]))
    assert any("1 classes of 2 test images" in line for line in said)
    assert any("90.0 %" in line for line in said)


def test_a_bank_without_labels_is_refused() -> None:
    with pytest.raises(UserError, match=r"data/train: no sample has a class"):
        knn.check_labels(np.zeros(0, int), np.zeros(3, int), "data/train", "data/test")


def test_far_neighbours_at_a_small_temperature_do_not_overflow() -> None:
    votes = knn.vote(np.array([[1.0, -1.0]]), np.array([[0, 1]]), 2, 1e-3)
    assert np.isfinite(votes).all()
    assert votes[0, 0] == 1


def neighbours_on(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    bank, _ = blobs(90, 0)
    test, _ = blobs(7, 1)
    scores, ids = knn.nearest(test, bank, 20, device="cpu")
    return torch.from_numpy(scores), torch.from_numpy(ids)


@pytest.mark.parametrize("world", [2, 3])
def test_neighbours_are_the_same_over_ranks(world: int) -> None:
    scores, ids = neighbours_on(0, 1)
    for found_scores, found_ids in run_ranks(neighbours_on, world):
        assert torch.equal(found_scores, scores)
        assert torch.equal(found_ids, ids)
