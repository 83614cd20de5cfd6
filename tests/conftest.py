"""What all tests share: one thread, and the folder of real photographs where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder named by POLYVIEW_DATA (flickr1k, coco-mini, cifar10-24k.tar.gz, imagenet-sample-250)."""
    folder = os.environ.get("POLYVIEW_DATA")
    if not folder:
        pytest.skip("POLYVIEW_DATA is not set: real photographs are not on this machine")
    if not Path(folder).is_dir():
        pytest.fail(f"POLYVIEW_DATA={folder} is not a folder")
    return Path(folder)


@pytest.fixture(autouse=True)
def no_rank_left_behind() -> Iterator[None]:
    """What a rank in this process tells DeepSpeed by the environment is not told to the next test."""
    before = os.environ.get("LOCAL_RANK")
    yield
    if before is None:
        os.environ.pop("LOCAL_RANK", None)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Where POLYVIEW_CI is set nothing may be skipped but what needs a GPU: a skip is a failure there."""
    report = (yield).get_result()
    if report.skipped and os.environ.get("POLYVIEW_CI") and not item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be: {report.longrepr}"
