"""What every order is to the rest of a run, and what all orders share: rows of a rank, digest, refusals.

An order is a pure function of its description and the step: the reader asks it for batches, the checkpoint
keeps its description, a resume compares the two. Which samples a batch holds is the business of `order` (every
sample once an epoch) and `balanced` (every class alike).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from pretrain.errors import UserError


class Batch(NamedTuple):
    """Rows of one rank at one step: places in the line of their source, that source, its epoch; (b,) each."""

    ids: np.ndarray  # int64
    source: np.ndarray  # int32
    epoch: np.ndarray  # int64


class Order(ABC):
    """The order of one run: immutable, cheap to make, the same on every rank."""

    seed: int
    global_batch: int
    samples: int  # in all sources, those that are seen
    lanes: int  # lines that a batch takes its rows from; a rank reads its share of them
    window: int  # neighbours of a lane that are shuffled among themselves
    blocks: list[int]  # by source: samples that are worth reading at once

    @abstractmethod
    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rows [rank * B / world, (rank + 1) * B / world) of the global batch of `step`, in order.

        Raises UserError when `world` does not divide the batch.
        """

    @abstractmethod
    def description(self) -> dict:
        """All that the order depends on, as plain JSON."""

    @abstractmethod
    def check_continues(self, saved: dict, step: int) -> None:
        """Raise UserError, saying what differs, unless the run described by `saved` may go on at `step`."""

    def epoch_of(self, step: int) -> float:
        """Samples seen before `step`, over all samples."""
        return step * self.global_batch / self.samples

    def digest(self) -> str:
        """sha256 of the description; equal digests give equal batches at every step."""
        return hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode()).hexdigest()

    def _rows(self, step: int, rank: int, world: int) -> np.ndarray:
        """Numbers (b,) of a rank's rows in the global batch."""
        if world < 1 or self.global_batch % world:
            raise UserError(_world_message(self.global_batch, world))
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in [0, {world}), got {rank}")
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        share = self.global_batch // world
        return np.arange(rank * share, (rank + 1) * share, dtype=np.int64)


def refuse_other(ours: dict, theirs: dict, step: int, advice: str) -> None:
    """UserError with `advice` when two descriptions differ, naming what differs."""
    differing = [name for name in dict.fromkeys([*ours, *theirs]) if ours.get(name) != theirs.get(name)]
    if differing:
        told = "; ".join(f"{name} was {theirs.get(name)} and is {ours.get(name)}" for name in differing)
        raise UserError(f"the sample order is not the one this run followed up to step {step}: {told}. {advice}")


def _world_message(global_batch: int, world: int) -> str:
    if world < 1:
        return f"world must be at least 1, got {world}"
    below = global_batch // world * world
    batches = [b for b in (below, below + world) if b]
    divisors = [w for w in range(1, global_batch + 1) if global_batch % w == 0]
    worlds = [max(w for w in divisors if w < world), *[w for w in divisors if w > world][:1]]
    return (
        f"global batch {global_batch} does not divide among {world} ranks: use a global batch of "
        f"{' or '.join(map(str, batches))}, or {' or '.join(map(str, worlds))} ranks"
    )
