"""What each figure is, in one line: the words that stand beside it in the report."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Meaning:
    """A metric as a person reads it."""

    label: str
    line: str
    """What it is, one line."""
    kind: Literal["share", "rank", "plain"] = "share"
    """share: 0..1, shown in percent, more is better; rank: from 1, less is better; plain: shown as it is."""


@dataclass(frozen=True)
class Task:
    """An evaluation as a person reads it."""

    title: str
    line: str
    headline: tuple[str, ...]
    """The metric that stands for the whole on top of the report: the first of these that the result has."""


TASKS = {
    "zeroshot_retrieval": Task(
        "Retrieval",
        "Captions find their photograph and photographs find their captions, by cosine alone.",
        ("image_retrieval_recall@5", "image_retrieval_recall@1"),
    ),
    "zeroshot_classification": Task(
        "Zero-shot classification",
        "Each image takes the class whose written name lies nearest; no labelled image was used.",
        ("acc1",),
    ),
    "knn": Task(
        "Nearest-neighbour classification",
        "Each test image takes the class its nearest labelled images vote for; no label was trained on.",
        ("k20_acc1", "k200_acc1"),
    ),
    "spectrum": Task(
        "Spectrum of the features",
        "How many directions the features use, in the encoder and behind its projector. No label is used.",
        (),
    ),
    "class_relations": Task(
        "Relations of classes",
        "What the gates of Hydra say of the classes they were trained on. No image is used.",
        (),
    ),
}

_CLASS_MEAN = "The share of right answers of each class, averaged: rare classes weigh as much as common ones."

_PATTERNS: tuple[tuple[str, Meaning], ...] = (
    (
        r"image_retrieval_recall@(?P<n>\d+)",
        Meaning("caption → image, R@{n}", "Share of captions whose own photograph comes {among}."),
    ),
    (
        r"text_retrieval_recall@(?P<n>\d+)",
        Meaning("image → caption, R@{n}", "Share of photographs of which one caption comes {among}."),
    ),
    (
        r"image_retrieval_median_rank",
        Meaning(
            "caption → image, median",
            "Half of the captions find their photograph at this place or before.",
            "rank",
        ),
    ),
    (
        r"text_retrieval_median_rank",
        Meaning(
            "image → caption, median",
            "Half of the photographs find one of their captions here or before.",
            "rank",
        ),
    ),
    (
        r"k(?P<k>\d+)_acc(?P<n>\d+)",
        Meaning(
            "top-{n}, k = {k}",
            "Share of test images whose class comes {among} in the vote of the {k} nearest.",
        ),
    ),
    (r"k(?P<k>\d+)_mean_per_class_recall", Meaning("class mean, k = {k}", _CLASS_MEAN)),
    (r"acc(?P<n>\d+)", Meaning("top-{n}", "Share of images whose class name comes {among} by nearness.")),
    (r"mean_per_class_recall", Meaning("class mean", _CLASS_MEAN)),
    (
        r"(?P<part>encoder|projector)_rankme",
        Meaning("{part}, RankMe", "Effective rank of the features as they are: 1 is collapse.", "plain"),
    ),
    (
        r"(?P<part>encoder|projector)_effective_rank",
        Meaning("{part}, effective rank", "Of the covariance: how evenly its directions are used.", "plain"),
    ),
    (
        r"(?P<part>encoder|projector)_directions",
        Meaning("{part}, directions", "Directions above a thousandth of the strongest.", "plain"),
    ),
    (
        r"openness_own",
        Meaning("openness, one class", "Share of dimensions that a class opens with itself, mean of all."),
    ),
    (
        r"openness_pairs",
        Meaning("openness, two classes", "Share of dimensions that two classes open, mean of all pairs."),
    ),
    (
        r"gate_entropy",
        Meaning("gate entropy", "0: every gate is open or closed; 0.693: all stand half open.", "plain"),
    ),
    (
        r"relation_spread",
        Meaning("spread of relations", "Root mean square relation of two classes; 0: all have one gate.", "plain"),
    ),
)


def meaning(metric: str) -> Meaning:
    """What `metric` is; a metric of another tool stands under its own name."""
    for pattern, known in _PATTERNS:
        if found := re.fullmatch(pattern, metric):
            parts = found.groupdict()
            among = "first" if parts.get("n") == "1" else f"among the first {parts.get('n')}"
            return Meaning(known.label.format(**parts), known.line.format(among=among, **parts), known.kind)
    return Meaning(metric, "A figure of another tool: not described here.", "plain")


def task(name: str) -> Task:
    """What the evaluation `name` is; one of another tool stands under its own name."""
    return TASKS.get(name, Task(name, "An evaluation of another tool.", ()))
