"""The evaluations end to end: encoder and shards in, a result and its pictures out.

Called by all ranks together; the vectors and ranks are computed over ranks, intervals and pictures on the
first rank alone, the only one that gets a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from downstream import classification, knn, pictures, retrieval, scores, zeroshot
from downstream.features import Images, encode_captions, encode_images, encode_texts
from downstream.intervals import DRAWS
from downstream.results import Result
from downstream.samples import Samples
from downstream.weights import Output, Weights
from pretrain.distributed.groups import Group, resolve

SEED = 0  # of intervals and of what is shown; not an option: two reports should show the same


@dataclass
class Evaluation:
    """What an evaluation hands over."""

    result: Result
    pictures: dict[str, Any]


def evaluate_retrieval(weights: Weights, samples: Samples, *, group: Group = None) -> Evaluation | None:
    """Image-text retrieval over the whole of `samples`; None on all ranks but the first.

    Raises:
        UserError: no image or no caption can be read, or the encoder has no text tower.
    """
    images = encode_images(weights, samples, group=group)
    captions = encode_captions(weights, samples, group=group)
    found = scores.retrieve(images, captions, samples.spec, device=weights.device, group=group)
    if resolve(group)[1]:
        return None
    ids, ranks = found.ids, found.ranks
    counts = {"images": len(ids), "captions": len(found.usable)}
    notes = _damage(images, samples) + _captions_left(captions.damaged, len(ids) - len(ranks.text))
    result = Result(
        **_names(weights, samples, "zeroshot_retrieval"),
        metrics=retrieval.metrics(ranks),
        intervals=retrieval.intervals(ranks, seed=SEED),
        chance=retrieval.chance(ranks),
        details=_details(weights, "embedding", counts, notes, "images, each with all its captions"),
    )
    written = [captions.texts[q] for q in found.usable]
    shown = _retrieval_pictures(samples, found, images.labels[ids], written)
    return Evaluation(result, shown)


def _retrieval_pictures(
    samples: Samples, found: scores.Retrieved, labels: np.ndarray, written: list[str]
) -> dict[str, Any]:
    thumbnails = pictures.Thumbnails(samples)
    images, texts, ids, ranks = found.images, found.captions, found.ids, found.ranks
    owner, asked = ranks.owner, np.unique(ranks.owner)
    return {
        "chosen": pictures.how_chosen(SEED),
        "captions": pictures.captions_find(thumbnails, images, texts, owner, ids, ranks.image, written, seed=SEED),
        "photographs": pictures.images_find(
            thumbnails, images[asked], texts, owner, asked, ids[asked], ranks.text, written, seed=SEED
        ),
        "neighbours": pictures.alike(thumbnails, images, ids, seed=SEED),
        "map": _map(thumbnails, images, ids, labels, samples),
    }


def evaluate_knn(
    weights: Weights, train: Samples, test: Samples, *, output: Output = "pooled", group: Group = None
) -> Evaluation | None:
    """kNN classification of `test` by the labelled images of `train`; None on all ranks but the first.

    Raises:
        UserError: no labelled image that can be read on either side.
    """
    bank, queries = (encode_images(weights, s, output=output, group=group) for s in (train, test))
    most = max(p.k for p in knn.PROTOCOLS)
    near = scores.neighbours(bank, queries, most, train.spec, test.spec, device=weights.device, group=group)
    if resolve(group)[1]:
        return None
    answers = {p.name: near.answers(p) for p in knn.PROTOCOLS}
    classes, train_ids, test_ids = near.classes, near.train_ids, near.test_ids
    counts = {"training images": len(train_ids), "test images": len(test_ids), "classes": classes}
    notes = _damage(bank, train) + _damage(queries, test) + knn.notes(near.train_labels, near.test_labels)
    notes += _unlabelled(bank, train) + _unlabelled(queries, test)
    result = Result(
        **_names(weights, test, "knn"),
        metrics=_prefixed({n: classification.metrics(a) for n, a in answers.items()}),
        intervals=_prefixed({n: classification.intervals(a, seed=SEED) for n, a in answers.items()}),
        chance=_prefixed({n: classification.chance(classes) for n in answers}),
        details=_details(weights, output, counts, notes, "test images"),
    )
    result.details["protocols"] = {p.name: {"k": p.k, "temperature": p.temperature} for p in knn.PROTOCOLS}
    names = _class_names(test, near.size)
    first = answers[knn.PROTOCOLS[0].name]
    tests, trains = pictures.Thumbnails(test), pictures.Thumbnails(train)
    voters = pictures.Near(near.similarity, near.found, near.train_labels[near.found])
    shown = {
        "chosen": pictures.how_chosen(SEED),
        "neighbours": pictures.labelled_neighbours(tests, trains, test_ids, train_ids, voters, first, names, seed=SEED),
        "confusion": pictures.confusion(first, names),
        "map": pictures.embedding_map(tests, queries.vectors[test_ids], test_ids, near.test_labels, names, seed=SEED),
    }
    return Evaluation(result, shown)


def evaluate_zeroshot(
    weights: Weights, samples: Samples, classnames: list[str], templates: list[str], *, group: Group = None
) -> Evaluation | None:
    """Zero-shot classification of `samples` by class names in templates; None on all ranks but the first.

    Raises:
        UserError: no labelled image can be read, a label has no class name, or the encoder has no text tower.
    """
    images = encode_images(weights, samples, group=group)
    zeroshot.check_classes(np.where(images.whole, images.labels, -1), classnames, samples)
    prompts = encode_texts(weights, zeroshot.prompts(classnames, templates), group=group)
    if resolve(group)[1]:
        return None
    found = scores.name(images, prompts, len(classnames))
    ids, labels, answers = found.ids, found.labels, found.answers
    counts = {"images": len(ids), "classes": len(classnames), "templates": len(templates)}
    notes = _damage(images, samples) + _unlabelled(images, samples)
    result = Result(
        **_names(weights, samples, "zeroshot_classification"),
        metrics=classification.metrics(answers),
        intervals=classification.intervals(answers, seed=SEED),
        chance=classification.chance(len(classnames)),
        details=_details(weights, "embedding", counts, notes, "images"),
    )
    thumbnails = pictures.Thumbnails(samples)
    everyone = np.arange(len(classnames))
    shown = {
        "chosen": pictures.how_chosen(SEED),
        "named": pictures.images_find(
            thumbnails, found.images, found.names, everyone, labels, ids, answers.ranks, classnames, seed=SEED
        ),
        "confusion": pictures.confusion(answers, classnames),
        "map": pictures.embedding_map(thumbnails, found.images, ids, labels, classnames, seed=SEED),
    }
    return Evaluation(result, shown)


def _names(weights: Weights, samples: Samples, task: str) -> dict[str, str]:
    model = weights.encoder.model.image
    return {"dataset": samples.dataset, "model": model, "pretrained": weights.name, "task": task}


def _details(weights: Weights, output: str, counts: dict[str, int], notes: list[str], drawn: str) -> dict[str, Any]:
    how = f"95 %, percentile bootstrap over {drawn}, {DRAWS:,} draws, seed {SEED}"
    return {**weights.origin(), "features": output, "counts": counts, "notes": notes, "intervals": how}


def _map(thumbnails, vectors: np.ndarray, ids: np.ndarray, labels: np.ndarray, samples: Samples) -> dict[str, Any]:
    """Coloured by class where nearly all images have one."""
    if (labels >= 0).mean() < 0.9:
        return pictures.embedding_map(thumbnails, vectors, ids, seed=SEED)
    names = _class_names(samples, int(labels.max()) + 1)
    return pictures.embedding_map(thumbnails, vectors, ids, labels, names, seed=SEED)


def _class_names(samples: Samples, size: int) -> list[str]:
    """Names of classes 0 to size - 1: the data set's where it has them, else their numbers."""
    path = samples.beside("classnames.txt")
    known = zeroshot.read_lines(path) if path else []
    return [*known[:size], *(f"class {i}" for i in range(len(known), size))]


def _damage(images: Images, samples: Samples) -> list[str]:
    lost = np.flatnonzero(~images.whole)
    if not len(lost):
        return []
    keys = ", ".join(samples.key(int(i)) for i in lost[:5])
    more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
    return [f"{len(lost)} images of {samples.spec} could not be read and are left out: {keys}{more}"]


def _unlabelled(images: Images, samples: Samples) -> list[str]:
    without = int((images.whole & (images.labels < 0)).sum())
    return [f"{without} images of {samples.spec} have no class and are left out"] if without else []


def _captions_left(damaged: int, without: int) -> list[str]:
    said = [f"{damaged} samples have captions that are not UTF-8: left out"] if damaged else []
    return said + (
        [f"{without} images have no caption: they are only there to be mistaken for others"] if without else []
    )


def _prefixed(by_protocol: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{name}_{metric}": value for name, values in by_protocol.items() for metric, value in values.items()}
