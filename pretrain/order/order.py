"""Which sample when: the global batch of any step as a pure function of (sources, seed, step).

The samples of a source stand in one line, shard after shard. The line is cut into blocks; each epoch
permutes the blocks and deals the permuted line into C lanes; each lane shuffles inside windows. A batch
takes the same number of rows from every lane, and a lane runs on from one epoch into its next, so no batch
is ragged, nothing is dropped, and the rows that carry epoch e are every sample exactly once. Nothing is
stored: the permutations are keyed bijections evaluated at the rows asked for, so a run resumes from its
step alone, at any world size that divides the batch, and opening a source costs the same whatever its
length.

Several sources share the lanes: `mixture` says which source a row is of and which turn of that source in
the lane, and the source's own order goes on from turn to turn.

It reads no data and knows no sample keys: an id is a place in the source's line of samples.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence

import numpy as np

from pretrain.errors import UserError
from pretrain.order.base import Batch, Order, refuse_other
from pretrain.order.mixture import Mixture
from pretrain.order.permutation import keyed_hash, permute
from pretrain.philox import MAX_ID, MAX_SOURCE, key

ORDER_VERSION = 1  # raised only when the same description would give other batches
MAX_LANES = 512
FEW_LANES = 64  # with fewer, and several rows of each in a batch, neighbours of a shard meet often
MAX_BLOCK = 256

log = logging.getLogger(__name__)


class SampleOrder(Order):
    """Every sample once an epoch, shuffled; several sources in a given mix.

    sources: one list of shard lengths (samples) each.
    weights: one number a source; None is proportional to their samples, never below 1 row in 10,000.
    segments: (from_step, weights) in rising steps, each valid until the next.
    block: samples that stay together in the permuted line; None is N / (16 C) within 1 to 256, by source.
    window: most neighbours of a lane that are shuffled among themselves (lanes are cut into equal windows).
    Raises UserError for an empty source, a batch larger than the samples, and weights that cannot be met.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[int]],
        *,
        seed: int,
        global_batch: int,
        weights: Sequence[float] | None = None,
        segments: Iterable[tuple[int, Sequence[float]]] = (),
        block: int | None = None,
        window: int = 4096,
    ):
        lines = _checked_lines(sources)
        self._sizes = np.array([int(line.sum()) for line in lines], np.int64)
        self.samples = int(self._sizes.sum())
        self.seed, self.global_batch, self.window = int(seed), int(global_batch), int(window)
        _check_settings(self.samples, self.global_batch, self.window, block)
        self.lanes = _lanes(self.global_batch, int(self._sizes.min()))
        self._share = self.global_batch // self.lanes  # rows a lane gives to a batch
        self._warn_of_few_lanes()
        self.blocks = [block or _default_block(samples, self.lanes) for samples in self._sizes.tolist()]
        self._mixture = Mixture(self._sizes, weights, segments, global_batch=self.global_batch, lanes=self.lanes)
        self._block_keys, self._window_keys = self._keys("block"), self._keys("window")
        self._described = [_described(line) for line in lines]

    # ---- what a run asks ---------------------------------------------------------------------------------

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rows [rank * B / world, (rank + 1) * B / world) of the global batch of `step`, in order.

        Raises UserError when `world` does not divide the batch.
        """
        rows = self._rows(step, rank, world)
        lanes, positions = rows // self._share, step * self._share + rows % self._share
        source, turn = self._mixture.turns(step, lanes, positions)
        start = lanes * self._sizes[source] // self.lanes
        length = (lanes + 1) * self._sizes[source] // self.lanes - start
        epoch, place = np.divmod(turn, length)
        line = start + self._shuffled(source, epoch, lanes, place, length)
        return Batch(self._dealt(source, epoch, line), source, epoch)

    def description(self) -> dict:
        """All that the order depends on, as plain JSON; `mix`: [from_step, rows of each source in 10,000]."""
        return {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "window": self.window,
            "block": self.blocks,
            "sources": self._described,
            "mix": self._mixture.description(),
        }

    def check_continues(self, saved: dict, step: int) -> None:
        """Raise UserError, saying what differs, unless the run described by `saved` may go on at `step`.

        All must be equal but the mix from `step` on: new weights are a segment from this step or a later one.
        """
        ours, theirs = self.description(), dict(saved)
        for description in (ours, theirs):
            description["mix"] = [list(part) for part in description.get("mix", []) if part[0] < step]
        advice = f"Resume with the settings of the run; new weights are a segment from step {step} on"
        refuse_other(ours, theirs, step, advice)

    # ---- from a row to its id ----------------------------------------------------------------------------

    def _shuffled(self, source, epoch, lanes, place, length) -> np.ndarray:
        """(b,) places in the lane after the shuffle inside windows; one begins at w * length // windows."""
        windows = -(-length // self.window)
        window = (place * windows + windows - 1) // length
        first = window * length // windows
        size = (window + 1) * length // windows - first
        keys = keyed_hash(self._window_keys[source], epoch.astype(np.uint64))
        keys = keyed_hash(keys, ((lanes << 32) | window).astype(np.uint64))
        return first + permute(place - first, size, keys)

    def _dealt(self, source: np.ndarray, epoch: np.ndarray, line: np.ndarray) -> np.ndarray:
        """(b,) ids at places of the permuted line: whole blocks but for the last, short one."""
        samples, block = self._sizes[source], np.array(self.blocks)[source]
        blocks = -(-samples // block)
        keys = keyed_hash(self._block_keys[source], epoch.astype(np.uint64))
        gap = blocks * block - samples  # samples the last block lacks
        short = self._place_of_last(source, epoch, blocks, keys)
        line = line + np.where(line >= (short + 1) * block - gap, gap, 0)  # as if the last block were whole
        place, inside = np.divmod(line, block)
        return permute(place, blocks, keys) * block + inside

    @staticmethod
    def _place_of_last(source, epoch, blocks, keys) -> np.ndarray:
        """(b,) place of the last block in the permuted line, worked out once for each source and epoch."""
        _, first, back = np.unique(epoch * MAX_SOURCE + source, return_index=True, return_inverse=True)
        return permute(blocks[first] - 1, blocks[first], keys[first], inverse=True)[back]

    # ---- making it ---------------------------------------------------------------------------------------

    def _keys(self, purpose: str) -> np.ndarray:
        return np.array([key(self.seed, "order", purpose, d) for d in range(len(self._sizes))], np.uint64)

    def _warn_of_few_lanes(self) -> None:
        long = int(self._sizes.max()) > self.lanes * self.window
        if self.lanes < FEW_LANES and self._share > 1 and long:
            log.warning(
                f"global batch {self.global_batch} gives only {self.lanes} lanes (its largest divisor up to "
                f"{MAX_LANES} and to the smallest source), {self._share} rows each: neighbours of a "
                f"shard will meet often; a multiple of {FEW_LANES} is shuffled better"
            )


def _checked_lines(sources: Sequence[Sequence[int]]) -> list[np.ndarray]:
    if not 0 < len(sources) < MAX_SOURCE:
        raise UserError(f"{len(sources)} sources: give 1 to {MAX_SOURCE - 1}; one source may be many folders")
    lines = [np.asarray(lengths) for lengths in sources]
    for d, line in enumerate(lines):
        if line.ndim == 1 and not line.size:
            raise UserError(f"source {d} has no shards: check its path, or pack it first")
        if line.ndim != 1 or line.dtype.kind not in "iu" or line.min() < 0:
            raise UserError(f"source {d} must be a list of shard lengths, whole numbers from 0 on")
        if not 0 < int(line.sum()) < MAX_ID:
            raise UserError(f"source {d}: {line.size} shards hold {line.sum()} samples; pack it again, or leave it out")
    return lines


def _check_settings(samples: int, global_batch: int, window: int, block: int | None) -> None:
    for name, value in (("global batch", global_batch), ("window", window), ("block", block)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if global_batch > samples:
        raise UserError(
            f"global batch {global_batch} is larger than the {samples} samples of the sources: a batch would "
            f"hold samples twice. Use {samples} or less (a multiple of world x accumulation), or add data"
        )


def _lanes(global_batch: int, smallest: int) -> int:
    return max(c for c in range(1, min(MAX_LANES, smallest) + 1) if global_batch % c == 0)


def _default_block(samples: int, lanes: int) -> int:
    return min(max(samples // (16 * lanes), 1), MAX_BLOCK)


def _described(line: np.ndarray) -> dict:
    lengths = hashlib.sha256(line.astype("<i8").tobytes()).hexdigest()
    return {"samples": int(line.sum()), "shards": len(line), "lengths": lengths}
