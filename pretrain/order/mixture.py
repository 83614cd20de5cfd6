"""Which source each row of a run belongs to, and how many rows of that source its lane has had: closed forms.

Weights become whole numbers over PERIOD slots, laid out evenly; slot t of a lane belongs to the source that
the layout names at t modulo PERIOD. Lane l starts l * share slots into the layout (share: rows a lane gives
to a batch), so row i of step s holds slot s * share + i: every batch, and every rank's part of it, is one
contiguous run of the layout, and its mix is exact to a row or two. A segment changes the weights from a
step on; the rows a source has had are summed over segments, so that each source keeps its own order through
every change.

It does not say which sample of a source a row holds: that is `order`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from pretrain.errors import UserError

PERIOD = 10_000  # slots over which weights become whole numbers: the smallest share is 1 / PERIOD


class Mixture:
    """The mix of one run. `sizes` (D,): samples of each source; the other arguments as in `SampleOrder`.

    Raises UserError for weights that are none, and for a source of which a batch would hold samples twice.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        weights: Sequence[float] | None,
        segments: Iterable[tuple[int, Sequence[float]]],
        *,
        global_batch: int,
        lanes: int,
    ):
        self._share = global_batch // lanes
        self._segments = [_Segment(0, _checked_quotas("weights", weights, sizes, global_batch))]
        for from_step, changed in segments:
            name = f"segment from step {from_step}"
            if from_step < self._segments[-1].from_step:
                raise UserError(f"{name} stands after step {self._segments[-1].from_step}: put them in rising steps")
            self._segments.append(_Segment(from_step, _checked_quotas(name, changed, sizes, global_batch)))
        self._had = self._counts_at_segments(len(sizes), lanes)

    def turns(self, step: int, lanes: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of rows (b,) of `step`, and its rows before them in their lane; (b,) each."""
        active = max(k for k, segment in enumerate(self._segments) if segment.from_step <= step)
        segment, offsets = self._segments[active], lanes * self._share
        slots, first = positions + offsets, segment.from_step * self._share + offsets
        source = segment.pattern[slots % PERIOD]
        return source, self._had[active][source, lanes] + segment.count(source, slots) - segment.count(source, first)

    def description(self) -> list:
        """[from_step, slots of each source in PERIOD] of every segment, as plain JSON."""
        return [[segment.from_step, segment.quotas.tolist()] for segment in self._segments]

    def _counts_at_segments(self, sources: int, lanes: int) -> list[np.ndarray]:
        """For each segment, (sources, lanes): rows of a source that a lane has given when it begins."""
        every, offsets = np.arange(sources)[:, None], np.arange(lanes)[None, :] * self._share
        had = [np.zeros((sources, lanes), np.int64)]
        for segment, following in zip(self._segments, self._segments[1:]):
            begin, end = (s.from_step * self._share + offsets for s in (segment, following))
            had.append(had[-1] + segment.count(every, end) - segment.count(every, begin))
        return had


class _Segment:
    """One layout: the source of each slot, and its count before any slot."""

    def __init__(self, from_step: int, quotas: list[int]):
        self.from_step, self.quotas = int(from_step), np.array(quotas, np.int64)
        middles = np.concatenate([(2 * np.arange(quota) + 1) / quota for quota in quotas if quota])
        owners = np.repeat(np.arange(len(quotas), dtype=np.int32), quotas)
        self.pattern = owners[np.argsort(middles, kind="stable")]  # each source's slots at even intervals
        self._before = np.zeros((len(quotas), PERIOD), np.int64)
        for d in range(len(quotas)):
            self._before[d, 1:] = np.cumsum(self.pattern[:-1] == d)

    def count(self, source: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Slots of `source` before each of `slots`."""
        return slots // PERIOD * self.quotas[source] + self._before[source, slots % PERIOD]


def _checked_quotas(name: str, weights: Sequence[float] | None, sizes: np.ndarray, global_batch: int) -> list[int]:
    samples = sizes.tolist()
    checked = samples if weights is None else _checked_weights(name, weights, len(samples))
    quotas = _quotas(checked)
    for d, (quota, held) in enumerate(zip(quotas, samples)):
        rows = (quota * global_batch + PERIOD // 2) // PERIOD
        if rows > held:
            raise UserError(
                f"{name}: source {d} has {held} samples, and {rows} rows of each batch of {global_batch} "
                "would be of it: lower its weight or the batch, or join the source with another"
            )
    return quotas


def _checked_weights(name: str, weights: Sequence[float], sources: int) -> list[float]:
    weights = [float(w) for w in weights]
    total = sum(weights)
    if len(weights) != sources:
        raise UserError(f"{name}: {len(weights)} weights for {sources} sources: give one for each")
    if not all(0 <= w < float("inf") for w in weights) or not total:
        raise UserError(f"{name}: {weights} must be finite, none negative, not all zero")
    for d, w in enumerate(weights):
        if 0 < w * PERIOD < total * (1 - 1e-9):
            raise UserError(
                f"{name}: source {d} has a share of {w / total:.2g}, below the smallest, 1 in {PERIOD}: "
                "raise it, set it to 0, or join the source with another"
            )
    return weights


def _quotas(weights: Sequence[float] | Sequence[int]) -> list[int]:
    """Whole numbers that sum to PERIOD, nearest to the weights; at least 1 for every positive weight."""
    exact = [Fraction(w) for w in weights]
    total = sum(exact)
    shares = [PERIOD * w / total for w in exact]
    quotas = [max(int(share), int(share > 0)) for share in shares]
    while missing := PERIOD - sum(quotas):
        step = 1 if missing > 0 else -1
        able = [d for d, share in enumerate(shares) if share > 0 and quotas[d] + step >= 1]
        quotas[max(able, key=lambda d: (step * (shares[d] - quotas[d]), -d))] += step
    return quotas
