"""A minute of SwAV through the real trainer beats the tower it began with, on CIFAR-10 images neither has seen."""

from __future__ import annotations

import pytest

from benchmarks.learning import data
from benchmarks.learning.__main__ import SHORT
from benchmarks.learning.runs import Bench
from benchmarks.learning.settings import METHODS
from pretrain.errors import UserError

MARGIN = 0.03  # see docs/DECISIONS.md: what three seeds gave


@pytest.fixture(scope="module")
def bench(real_data, tmp_path_factory):
    work = tmp_path_factory.mktemp("learning")
    data.pack(work / "data")
    return Bench(work, "validation")


@pytest.mark.real
@pytest.mark.timeout(600)
def test_a_minute_of_swav_beats_the_untrained_tower_and_is_not_trained_twice(bench):
    method = METHODS["swav"]._replace(steps=SHORT)
    found = bench.run(method, "short", 0)
    assert found["knn_k20"] > bench.untrained(0)["knn_k20"] + MARGIN
    assert bench.run(method, "short", 0) == found
    with pytest.raises(UserError, match="other settings"):  # figures kept under a name are of these settings alone
        bench.run(method._replace(lr=2 * method.lr), "short", 0)
