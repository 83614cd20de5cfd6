"""What a live evaluation reads: shards opened, and all that can be wrong with them said, before training starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from downstream import knn, zeroshot
from downstream.features import Batch, Texts, decoded, read_captions
from downstream.samples import Samples
from downstream.weights import Towers
from pretrain.errors import UserError
from pretrain.patience import patiently
from pretrain.recipe import Recipe
from pretrain.recipe.run import EvaluateRecipe
from pretrain.views.decode import DamagedSample

KEPT_BYTES = 1 << 30
"""Decoded images that a rank keeps of a source: 7,000 of 224 x 224, so 5,000 fit on one rank. Others are decoded at
each evaluation."""


class LiveSamples(Samples):
    """The first samples of a source, evaluated again and again; this rank's decoded images are kept in host memory.

    failed: why this evaluation cannot be believed, "" while it can: what was not to be read is no damage, and not kept.
    """

    def __init__(self, spec: str, first: int | None) -> None:
        super().__init__(spec, first)
        self.known = np.full(len(self), -1)
        """(N,) int64 class numbers, -1 = none; read by `read_labels` alone."""
        self.failed = ""
        self._kept: list[Batch] = []
        self._full = False

    def read_labels(self) -> None:
        """Once; UserError where a `cls` is no number."""
        self.known = self.labels(range(len(self)))

    def image(self, sample: int) -> bytes:
        if not self.failed:  # else the others are not waited for, too
            try:
                return patiently(self._opened_anew, sample)
            except (OSError, UserError) as error:  # a link, or a shard that changed: no reason to end the training
                self.failed = f"{self.source.shards[self._locate(sample)[0]]}: {error}"
        raise DamagedSample(self.failed)

    def _opened_anew(self, sample: int) -> bytes:
        """After a read that failed, from files that are opened again."""
        try:
            return super().image(sample)
        except OSError:
            self.close()
            raise

    def leave_out(self, sample: int, reason: str) -> None:
        if not self.failed:
            super().leave_out(sample, reason)

    def decoder(self, towers: Towers, _: Samples, blocks: Sequence[range]) -> Iterator[Batch]:
        """As `features.decoded`; the first blocks, as many as fit, are decoded in the first evaluation alone."""
        self.failed = ""
        yield from list(self._kept)
        for batch in decoded(towers, self, blocks[len(self._kept) :]):
            room = KEPT_BYTES - sum(pixels.nbytes for pixels, _ in self._kept)
            self._full = self._full or batch[0].nbytes > room
            if not self._full and not self.failed:
                self._kept.append(batch)
            yield batch


@dataclass
class Sets:
    """What the recipe's tasks need."""

    test: LiveSamples
    train: LiveSamples | None = None
    captions: Texts | None = None
    classes: int = 0
    prompts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Worth knowing before the figures are believed."""


def open_sets(recipe: Recipe, asked: EvaluateRecipe) -> Sets:
    """The sets of `recipe.evaluate`.

    Raises:
        UserError: shards, labels, captions, class names or the text tower that a task needs are not there.
    """
    _check_texts(recipe, asked)
    with _named("shards"):
        sets = Sets(LiveSamples(asked.shards, asked.samples))
    if {"knn", "zeroshot"} & set(asked.tasks):
        with _named("shards"):
            sets.test.read_labels()
    if "knn" in asked.tasks:
        _open_bank(sets, asked)
    if "zeroshot" in asked.tasks:
        with _named("shards"):
            names, templates = zeroshot.names_and_templates(sets.test)
            zeroshot.check_classes(sets.test.known, names, sets.test)
        sets.classes, sets.prompts = len(names), zeroshot.prompts(names, templates)
    if "retrieval" in asked.tasks:
        with _named("shards"):
            sets.captions = read_captions(sets.test)
    return sets


def _check_texts(recipe: Recipe, asked: EvaluateRecipe) -> None:
    need = [task for task in asked.tasks if task in ("retrieval", "zeroshot")]
    if need and recipe.model.text is None:
        raise UserError(
            f"evaluate.tasks: {' and '.join(need)} need a text tower, but the recipe has model.text: null; choose knn "
            "or rankme"
        )


def _open_bank(sets: Sets, asked: EvaluateRecipe) -> None:
    if asked.train is None:
        raise UserError("evaluate.train: knn needs labelled shards that vote; name them, or take knn out of its tasks")
    with _named("train"):
        sets.train = LiveSamples(asked.train, asked.samples)
        sets.train.read_labels()
    train, test = (labels[labels >= 0] for labels in (sets.train.known, sets.test.known))
    knn.check_labels(train, test, f"evaluate.train: {asked.train}", f"evaluate.shards: {asked.shards}")
    sets.notes += knn.notes(train, test, [knn.PROTOCOLS[0]])


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Which field of the recipe an error is of."""
    try:
        yield
    except UserError as error:
        raise UserError(f"evaluate.{key}: {error}") from None
