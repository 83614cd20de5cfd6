"""Bootstrap intervals: as wide as theory says, seeded, drawn by group, honest where nothing varies."""

from __future__ import annotations

import numpy as np
import pytest

from downstream.intervals import bootstrap, weighted_median, widen_certain


def mean_of(values: np.ndarray):
    return lambda weight: np.array([weight @ values / weight.sum()])


def test_a_share_has_the_binomial_width() -> None:
    hits = (np.arange(1000) % 10 < 3).astype(float)
    low, high = bootstrap(mean_of(hits), np.arange(1000))[0]
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - half, abs=0.004)
    assert high == pytest.approx(0.3 + half, abs=0.004)


def test_queries_of_one_group_are_drawn_together() -> None:
    groups = np.repeat(np.arange(100), 10)
    hits = np.repeat(np.arange(100) % 2, 10).astype(float)  # a group agrees with itself: 100 draws, not 1,000
    low, high = bootstrap(mean_of(hits), groups)[0]
    assert high - low == pytest.approx(2 * 1.96 * 0.05, rel=0.15)


def test_the_seed_decides() -> None:
    values = np.random.default_rng(0).random(50)
    first, again, other = (bootstrap(mean_of(values), np.arange(50), seed=s) for s in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_no_queries_and_undefined_figures_have_no_interval() -> None:
    assert np.isnan(bootstrap(lambda w: np.array([np.nan, 1.0]), np.arange(4))[0]).all()
    assert np.isnan(bootstrap(lambda w: np.full(2, np.nan), np.arange(0))).all()


def test_nought_of_thirty_is_not_nought_for_certain() -> None:
    ends = widen_certain(np.array([[0.0, 0.0], [1.0, 1.0], [0.2, 0.4]]), 30)
    assert ends[0, 1] == pytest.approx(0.1157, abs=1e-4)  # Clopper and Pearson, 0 of 30
    assert ends[1, 0] == pytest.approx(1 - 0.1157, abs=1e-4)
    assert ends[2].tolist() == [0.2, 0.4]


def test_weighted_median() -> None:
    values = np.array([5.0, 1.0, 3.0])
    assert weighted_median(values, np.ones(3)) == 3
    assert weighted_median(values, np.array([0.0, 4.0, 1.0])) == 1
    assert weighted_median(np.array([1.0, 2.0]), np.ones(2)) == 1
    assert np.isnan(weighted_median(values, np.zeros(3)))
