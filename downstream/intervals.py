"""Confidence intervals by bootstrap over queries.

A figure on 1,000 test images moves by several points when the images change; a table without that width
invites decisions on noise. Queries are drawn with replacement as *counts* (how often each was drawn), so
every statistic is a function of one weight vector and all metrics of a result share the same draws. Queries
that belong together (the captions of one image) are drawn together, by passing one group a query.

Does not correct for the choice of the test set or for training with another seed: it answers only "how far
would these figures move on other queries like these".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

DRAWS = 1000
LEVEL = 0.95

Statistic = Callable[[np.ndarray], np.ndarray]


def bootstrap(
    statistic: Statistic, groups: np.ndarray, *, seed: int = 0, draws: int = DRAWS, level: float = LEVEL
) -> np.ndarray:
    """Percentile bootstrap (Efron 1979) of several figures at once.

    `groups` (Q,) int: queries of one group are drawn together; ``np.arange(Q)`` draws each alone. `statistic`
    takes how often each query was drawn, (Q,) float64, and returns (M,) figures (NaN: undefined there).
    Returns (M, 2): the lower and upper end of each figure; NaN where no draw defined it or there are no
    queries.
    """
    ids, group = np.unique(groups, return_inverse=True)
    if not len(ids):
        return np.full((len(statistic(np.zeros(0))), 2), np.nan)
    rng = np.random.Generator(np.random.PCG64(seed))
    figures = [statistic(_counts(rng, len(ids))[group]) for _ in range(draws)]
    return _percentiles(np.array(figures, float), level)


def _counts(rng: np.random.Generator, n: int) -> np.ndarray:
    """How often each of n things came up in n draws with replacement, (n,) float64."""
    return np.bincount(rng.integers(0, n, n), minlength=n).astype(float)


def _percentiles(figures: np.ndarray, level: float) -> np.ndarray:
    """(draws, M) -> (M, 2), undefined draws left out."""
    tail = (1 - level) / 2
    ends = np.full((figures.shape[1], 2), np.nan)
    for m, column in enumerate(figures.T):
        known = column[~np.isnan(column)]
        if len(known):
            ends[m] = np.quantile(known, [tail, 1 - tail])
    return ends


def widen_certain(ends: np.ndarray, groups: int, *, level: float = LEVEL) -> np.ndarray:
    """The interval of a share of which every query agreed: 0 of 30 is not "0 for certain".

    A bootstrap of all-equal queries has no width; there the exact binomial bound (Clopper and Pearson 1934)
    takes its place: 0 of n -> [0, 1 - a^(1/n)], n of n -> [a^(1/n), 1], a = (1 - level) / 2. Others return
    unchanged.
    """
    ends = ends.copy()
    reach = 1 - ((1 - level) / 2) ** (1 / max(groups, 1))
    ends[(ends == 0).all(1), 1] = reach
    ends[(ends == 1).all(1), 0] = 1 - reach
    return ends


def weighted_median(values: np.ndarray, weight: np.ndarray) -> float:
    """The median of `values` (Q,), each counted `weight` (Q,) times; of two the lower; NaN without weight."""
    if not weight.sum():
        return float("nan")
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(reached, reached[-1] / 2)])
