"""What a person looks at beside the figures: examples, neighbours, confusions, a map. Written as data, drawn
by the report.

Examples are drawn at random from all queries, never by success: picked ones would show what the picker
wished.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from downstream.classification import Answers
from downstream.embedding_map import as_picture, clusters
from downstream.samples import Samples
from index.search.exact import exact_topk
from pretrain.views.decode import DamagedSample, decode

EXAMPLES = 8
SHOWN = 6  # images found, a query
SHOWN_TEXTS = 5
MAP_POINTS = 500
SIDE, SMALL_SIDE = 128, 56  # pixels of a thumbnail's shorter side: examples, map
MOST_CLASSES = 40  # a larger matrix is no picture: only the worst pairs are kept
WORST = 10


class Thumbnails:
    """Samples' images as data URIs (JPEG), each made once."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._made: dict[tuple[int, int], str | None] = {}

    def __call__(self, sample: int, side: int = SIDE) -> str | None:
        """The image with its shorter side at most `side` pixels; None where it cannot be read."""
        key = (int(sample), side)
        if key not in self._made:
            self._made[key] = self._make(*key)
        return self._made[key]

    def _make(self, sample: int, side: int) -> str | None:
        try:
            image = Image.fromarray(decode(self._samples.image(sample)))
        except DamagedSample:
            return None
        scale = min(1.0, side / min(image.size))
        image = image.resize([max(1, min(round(n * scale), 3 * side)) for n in image.size], Image.Resampling.LANCZOS)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=78)
        return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def chosen(n: int, count: int, seed: int) -> np.ndarray:
    """`count` of n at random, in a random order that `seed` fixes; all where there are fewer."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(n)[:count]


def how_chosen(seed: int) -> str:
    """The sentence that says so in the report."""
    return f"Drawn at random (seed {seed}), not by success."


class Near(NamedTuple):
    """The nearest training images of each test image, best first."""

    scores: np.ndarray  # (Q, k) cosines
    rows: np.ndarray  # (Q, k) rows of the bank
    classes: np.ndarray  # (Q, k) their classes


def captions_find(
    thumbnails: Thumbnails, images, texts, owner, ids, ranks, written, *, seed: int
) -> list[dict[str, Any]]:
    """Captions and the images they found. `ids` (N,): samples of `images`; `written` (Q,): the captions;
    `ranks` (Q,): the place of each caption's own image, shown apart where it is not among the best.
    """
    picked = chosen(len(texts), EXAMPLES, seed)
    scores, found = exact_topk(texts[picked], images, SHOWN)
    examples = []
    for q, row_scores, row in zip(picked, scores, found):
        shown = [
            {"src": thumbnails(ids[i]), "score": float(s), "place": place, "right": bool(i == owner[q])}
            for place, (i, s) in enumerate(zip(row, row_scores), 1)
        ]
        if ranks[q] > len(row):
            score = float(images[owner[q]] @ texts[q])
            own = {
                "src": thumbnails(ids[owner[q]]),
                "score": score,
                "place": int(ranks[q]),
                "right": True,
                "gap": True,
            }
            shown.append(own)
        examples.append({"text": written[q], "rank": int(ranks[q]), "of": len(images), "found": shown})
    return examples


def images_find(
    thumbnails: Thumbnails, images, texts, owner, own, ids, ranks, written: Sequence[str], *, seed: int
) -> list[dict[str, Any]]:
    """Images (M, D), samples `ids` (M,), and the texts they found. Text t belongs to image m where
    `owner[t] == own[m]`; `ranks` (M,): the place of the first that does.
    """
    picked = chosen(len(images), EXAMPLES, seed + 1)
    _, found = exact_topk(images[picked], texts, SHOWN_TEXTS)
    return [
        {
            "src": thumbnails(ids[m]),
            "rank": int(ranks[m]),
            "of": len(texts),
            "found": [{"text": written[t], "right": bool(owner[t] == own[m])} for t in row],
        }
        for m, row in zip(picked, found)
    ]


def alike(thumbnails: Thumbnails, images, ids, *, seed: int) -> list[dict[str, Any]]:
    """Images of one set and those nearest to them, themselves left out."""
    picked = chosen(len(images), EXAMPLES, seed + 2)
    scores, found = exact_topk(images[picked], images, SHOWN + 1)
    examples = []
    for q, row_scores, row in zip(picked, scores, found):
        others = [(i, s) for i, s in zip(row, row_scores) if i != q][:SHOWN]
        shown = [{"src": thumbnails(ids[i]), "score": float(s), "place": p} for p, (i, s) in enumerate(others, 1)]
        examples.append({"src": thumbnails(ids[q]), "found": shown})
    return examples


def labelled_neighbours(
    tests: Thumbnails,
    trains: Thumbnails,
    test_ids,
    train_ids,
    near: Near,
    answers: Answers,
    names,
    *,
    seed: int,
) -> list[dict[str, Any]]:
    """Test images (samples `test_ids`), the training images nearest to them, and what these voted."""
    examples = []
    for q in chosen(len(test_ids), EXAMPLES, seed):
        right, voted = int(answers.labels[q]), int(answers.predicted[q])
        best = zip(near.rows[q, :SHOWN], near.scores[q, :SHOWN], near.classes[q, :SHOWN])
        shown = [
            {
                "src": trains(train_ids[i]),
                "score": float(s),
                "place": place,
                "name": names[c],
                "right": bool(c == right),
            }
            for place, (i, s, c) in enumerate(best, 1)
        ]
        head = {
            "src": tests(test_ids[q]),
            "name": names[right],
            "predicted": names[voted],
            "hit": right == voted,
        }
        examples.append(head | {"found": shown})
    return examples


def confusion(answers: Answers, names: Sequence[str]) -> dict[str, Any]:
    """The matrix (up to 40 classes), the pairs most often mistaken, and each class's recall."""
    present = np.flatnonzero(np.bincount(answers.labels, minlength=answers.size))
    (pairs, counts), recall = answers.confusion, answers.recall
    shown = np.bincount(answers.labels, minlength=answers.size)
    wrong = np.where(pairs[:, 0] == pairs[:, 1], 0, counts)
    worst = [i for i in np.argsort(-wrong, kind="stable")[:WORST] if wrong[i]]
    seen, place = np.unique(pairs, return_inverse=True)
    matrix = None
    if len(seen) <= MOST_CLASSES:
        matrix = np.zeros((len(seen), len(seen)), np.int64)
        matrix[tuple(place.reshape(-1, 2).T)] = counts
    return {
        "classes": [names[int(i)] for i in seen],
        "counts": None if matrix is None else matrix.tolist(),
        "mistakes": [[names[r], names[p], int(n), int(shown[r])] for (r, p), n in zip(pairs[worst], counts[worst])],
        "recalls": [[names[int(i)], float(recall[i]), int(shown[i])] for i in present],
    }


def embedding_map(thumbnails: Thumbnails, vectors, ids, labels=None, names=(), *, seed: int) -> dict[str, Any]:
    """A map of at most 500 images, coloured by class where `labels` are given, else by cluster."""
    picked = np.sort(chosen(len(vectors), MAP_POINTS, seed + 3))
    small = [thumbnails(ids[i], SMALL_SIDE) for i in picked]
    if labels is not None:
        return as_picture(vectors[picked], labels[picked], list(names), small, by="class", seed=seed)
    kinds = clusters(vectors[picked], seed=seed)
    named = [f"cluster {k + 1}" for k in range(int(kinds.max()) + 1)]
    return as_picture(vectors[picked], kinds, named, small, by="cluster", seed=seed)
