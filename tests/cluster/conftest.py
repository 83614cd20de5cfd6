"""One cluster for the whole session, handed to each test with all nodes up and no jobs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cluster.cluster import Cluster, missing
from tests.cluster.process import environment
from tests.cluster.runs import undisturbed
from tests.tiny import write_shards


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


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def ddp(tmp_path_factory: pytest.TempPathFactory, shards: Path, cluster: Cluster) -> dict[str, torch.Tensor]:
    return undisturbed(tmp_path_factory.mktemp("ddp"), shards, cluster, "ddp")


@pytest.fixture(scope="session")
def fsdp2(tmp_path_factory: pytest.TempPathFactory, shards: Path, cluster: Cluster) -> dict[str, torch.Tensor]:
    return undisturbed(tmp_path_factory.mktemp("fsdp2"), shards, cluster, "fsdp2")
