"""What kNN and zero-shot share: scores of classes -> ranks, accuracies, confusion, and their intervals.

Ties follow one rule everywhere: of equal scores the lower class comes first. Classes without test images have
no recall and stay out of the mean (as in scikit-learn's balanced accuracy, which CLIP_benchmark reports).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from downstream.intervals import bootstrap, widen_certain


@dataclass(frozen=True)
class Answers:
    """How a classifier did on each test image."""

    ranks: np.ndarray  # (Q,) place of the right class, from 1; more than `classes` where it got no score at all
    predicted: np.ndarray  # (Q,) class placed first
    labels: np.ndarray  # (Q,) right class
    classes: int  # how many classes there were to choose from: the chance level
    size: int  # class numbers are below this

    @property
    def confusion(self) -> tuple[np.ndarray, np.ndarray]:
        """The pairs that occur, (n, 2) right class and predicted class in order, and how often, (n,)."""
        flat, counts = np.unique(self.labels * self.size + self.predicted, return_counts=True)
        return np.stack(np.divmod(flat, self.size), 1), counts

    @property
    def recall(self) -> np.ndarray:
        """(size,) share of each class's test images placed first; NaN for a class without any."""
        return _recall(self.ranks == 1, self.labels, np.ones(len(self.labels)), self.size)


def answer(scores: np.ndarray, labels: np.ndarray, *, only_positive: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Ranks and predictions of one block of test images.

    `scores` (Q, C), `labels` (Q,) below C. Rank = 1 + strictly greater + equal with a lower class. With
    `only_positive` a class of score zero is no candidate, so a right class without a vote ranks C + 1.
    Returns (Q,) ranks and (Q,) predicted classes.
    """
    right = np.take_along_axis(scores, labels[:, None], 1)  # (Q, 1)
    before = (scores == right) & (np.arange(scores.shape[1]) < labels[:, None])
    ranks = 1 + ((scores > right) | before).sum(1)
    if only_positive:
        ranks = np.where(right[:, 0] > 0, ranks, scores.shape[1] + 1)
    return ranks, scores.argmax(1)


def metrics(answers: Answers) -> dict[str, float | None]:
    """acc1, acc5 and mean_per_class_recall; acc5 is None with fewer than five classes, all None without
    images.
    """
    figures = _figures(answers, np.ones(len(answers.labels)))
    return {k: None if np.isnan(v) else float(v) for k, v in zip(NAMES, figures)}


def intervals(answers: Answers, *, seed: int = 0) -> dict[str, list[float]]:
    """The 95 % interval of each metric that is defined, by bootstrap over test images."""
    images = len(answers.labels)
    ends = bootstrap(lambda weight: _figures(answers, weight), np.arange(images), seed=seed)
    ends = widen_certain(ends, images)
    return {k: [float(lo), float(hi)] for k, (lo, hi) in zip(NAMES, ends) if not np.isnan(lo)}


def chance(classes: int) -> dict[str, float]:
    """What guessing a class at random gives."""
    five = {"acc5": 5 / classes} if classes >= 5 else {}
    return {"acc1": 1 / classes, **five, "mean_per_class_recall": 1 / classes}


NAMES = ("acc1", "acc5", "mean_per_class_recall")


def _figures(answers: Answers, weight: np.ndarray) -> np.ndarray:
    """The three metrics with each image counted `weight` (Q,) times, (3,) float64."""
    total = weight.sum()
    if not total:
        return np.full(3, np.nan)
    acc1 = weight @ (answers.ranks == 1) / total
    acc5 = weight @ (answers.ranks <= 5) / total if answers.classes >= 5 else np.nan
    recall = _recall(answers.ranks == 1, answers.labels, weight, answers.size)
    return np.array([acc1, acc5, np.nanmean(recall)])


def _recall(hit: np.ndarray, labels: np.ndarray, weight: np.ndarray, size: int) -> np.ndarray:
    shown = np.bincount(labels, weights=weight, minlength=size)
    found = np.bincount(labels, weights=weight * hit, minlength=size)
    return np.divide(found, shown, out=np.full(size, np.nan), where=shown > 0)
