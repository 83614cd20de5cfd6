"""Every class alike: each global batch holds P classes with K samples each, a pure function of (labels, seed, step).

The classes stand in an endless line, round after round, each round every class once in an order of its own; a
batch takes the next P, never one twice (`lines` says how at a round's edge). The n-th time a class comes up it
takes the next K of its own endless line of samples, whose rounds are the class' epochs: each holds every sample
of the class once, and no batch holds a sample twice unless the class has fewer than K. Large classes take longer
for an epoch than small ones, so the epoch of a row is that of its class: a sample that comes again comes with
another epoch, and with other augmentations.

Row i of a batch is sample i // P of class i % P, so that any contiguous part, of a rank or of a micro-step, has
as many rows of one class as of another, to one row.

Samples of all sources with the same class number are one class. Without a class (-1) a sample is never seen.
Memory is 8 bytes a sample; it reads no data and keeps no state.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import numpy as np

from pretrain.errors import UserError
from pretrain.order.base import Batch, Order, refuse_other
from pretrain.order.lines import chunks
from pretrain.order.permutation import keyed_hash
from pretrain.philox import MAX_SOURCE, key

BALANCED_VERSION = 1  # raised only when the same description would give other batches
READ_TOGETHER = 16  # samples read at once where a rank can hold all there are; else they are read singly

log = logging.getLogger(__name__)


class BalancedOrder(Order):
    """P classes with K = global_batch / P samples each in every batch.

    labels: (N,) class numbers of each source's samples, -1 for none.
    `samples` counts those with a class; `epoch_of` is samples seen over these.
    Raises UserError for no class at all, and for a P that does not divide the batch or exceeds the classes.
    """

    def __init__(self, labels: Sequence[np.ndarray], *, seed: int, global_batch: int, classes_per_batch: int):
        lines = _checked_labels(labels)
        self.seed, self.global_batch, self.classes_per_batch = int(seed), int(global_batch), int(classes_per_batch)
        self._ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
        self._places, self._classes, self._begins, self._sizes = _by_class(np.concatenate(lines))
        self.samples = len(self._places)
        _check_classes(self.classes_per_batch, self.global_batch, len(self._classes))
        self._samples_each = self.global_batch // self.classes_per_batch
        self._warn(int(self._ends[-1]))
        self._line_key = np.array([key(seed, "order", "classes")], np.uint64)
        own = np.full(len(self._classes), key(seed, "order", "samples of a class"), np.uint64)
        self._class_keys = keyed_hash(own, self._classes.astype(np.uint64))
        # a class' samples lie anywhere: for reading, each source is one lane that is shuffled as a whole
        self.lanes, self.window, self.blocks = 1, int(self._ends[-1]), [READ_TOGETHER] * len(lines)
        self._described = [_described(line) for line in lines]

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rows [rank * B / world, (rank + 1) * B / world) of the global batch of `step`, in order.

        Raises UserError when `world` does not divide the batch.
        """
        sample, column = np.divmod(self._rows(step, rank, world), self.classes_per_batch)
        classes, visits = self._visited(step)
        wanted = np.arange(sample[0], sample[-1] + 1)
        inside, epochs = chunks(visits, self._sizes[classes], self._samples_each, self._class_keys[classes], wanted)
        taken = column, sample - sample[0]
        place = self._places[self._begins[classes[column]] + inside[taken]]
        source = np.searchsorted(self._ends, place, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        return Batch(place - starts[source], source.astype(np.int32), epochs[taken])

    def description(self) -> dict:
        """All that the order depends on, as plain JSON."""
        return {
            "balanced_version": BALANCED_VERSION,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "classes_per_batch": self.classes_per_batch,
            "sources": self._described,
        }

    def check_continues(self, saved: dict, step: int) -> None:
        """Raise UserError, saying what differs, unless `saved` describes this very order."""
        advice = "Resume with the settings, samples and classes of the run, or give the new run a folder of its own"
        refuse_other(self.description(), saved, step, advice)

    def _visited(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(P,) places of the batch's classes among all, and how often each has come up before."""
        classes = np.array([len(self._classes)])
        found, rounds = chunks(np.array([step]), classes, self.classes_per_batch, self._line_key)
        return found[0], rounds[0]  # every class comes once a round

    def _warn(self, samples: int) -> None:
        if self.samples < samples:
            log.warning(f"{samples - self.samples} of {samples} samples have no class: they are left out")
        small = np.flatnonzero(self._sizes < self._samples_each)
        if small.size:
            log.warning(
                f"class {self._classes[small[0]]} has fewer samples ({self._sizes[small[0]]}) than the "
                f"{self._samples_each} it gives to a batch{_others(small.size - 1)}: they repeat within a batch"
            )


def _checked_labels(labels: Sequence[np.ndarray]) -> list[np.ndarray]:
    if not 0 < len(labels) < MAX_SOURCE:
        raise UserError(f"{len(labels)} sources: give 1 to {MAX_SOURCE - 1}; one source may be many folders")
    lines = [np.asarray(line) for line in labels]
    for d, line in enumerate(lines):
        if line.ndim != 1 or line.dtype.kind not in "iu":
            raise ValueError(f"labels of source {d} must be one whole number a sample")
    return lines


def _by_class(line: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Places (n,) in the line of all labelled samples, class after class; class numbers, begins and sizes (C,)."""
    labelled = np.flatnonzero(line >= 0)
    places = labelled[np.argsort(line[labelled], kind="stable")]
    classes, begins, sizes = np.unique(line[places], return_index=True, return_counts=True)
    if not len(classes):
        raise UserError(
            f"data.classes_per_batch: none of the {len(line)} samples has a class (a .cls member with its number). "
            "Pack the shards again from a folder a class or a table with classes, or take the key out of the recipe"
        )
    return places, classes.astype(np.int64), begins.astype(np.int64), sizes.astype(np.int64)


def _check_classes(classes_per_batch: int, global_batch: int, classes: int) -> None:
    if global_batch < 1:
        raise UserError(f"global batch must be at least 1, got {global_batch}")
    fitting = [p for p in range(1, min(classes, global_batch) + 1) if global_batch % p == 0]
    if classes_per_batch in fitting:
        return
    near = [max((p for p in fitting if p < classes_per_batch), default=None)]
    near += [min((p for p in fitting if p > classes_per_batch), default=None)]
    raise UserError(
        f"data.classes_per_batch {classes_per_batch} must divide global_batch {global_batch} and be at most the "
        f"{classes} classes there are; try {' or '.join(str(p) for p in near if p)}"
    )


def _described(line: np.ndarray) -> dict:
    return {"samples": len(line), "labels": hashlib.sha256(line.astype("<i8").tobytes()).hexdigest()}


def _others(count: int) -> str:
    return f", as do {count} other classes" if count > 1 else ", as does one other class" if count else ""
