"""One cluster for the whole session, handed to each test with all nodes up and no jobs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, missing
from tests.cluster.process import environment


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes of four cores and two GPUs. Where POLYVIEW_CI is set, a machine that cannot make them fails."""
    if told := missing():
        pytest.skip(f"no Slurm cluster can be made here: {told}")
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def slurm(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster, which this process and those it starts find by their environment; what the test broke is mended."""
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.revive()
    cluster.cancel_all()
