"""The comparison of PyramidCLIP with CLIP, a tenth as long: what it prepares, counts and keeps."""

from __future__ import annotations

import argparse
from importlib import import_module

import pytest

from benchmarks import pyramid_clip
from benchmarks.pyramid_clip import METHODS, METRICS, SETS, of_set
from pretrain.shards.source import open_source
from pretrain.telemetry import read_log


def here(package: str, *argv: str) -> None:
    """The same command in this process, which has imported what it needs."""
    assert import_module(f"{package}.__main__").main(argv) == 0


@pytest.mark.real
@pytest.mark.timeout(900)
def test_both_learn_from_the_same_photographs_for_the_same_cpu_seconds(real_data, tmp_path, monkeypatch):
    monkeypatch.setattr(pyramid_clip, "PROBE", (4, 12))
    monkeypatch.setattr(pyramid_clip, "call", here)
    args = argparse.Namespace(work=tmp_path, seeds=[0], scale=0.1)
    rows = of_set("coco-mini", args)
    assert [(r["run"], r["seed"]) for r in rows] == [
        ("untrained", 0), ("clip", 0), ("clip", "mean"), ("pyramid_clip", 0), ("pyramid_clip", "mean")
    ]  # fmt: skip
    assert all(0 <= r[name] <= 1 for r in rows for name in METRICS)
    clip, pyramid = rows[1], rows[3]
    assert clip["steps"] > pyramid["steps"]  # its step costs more
    budget = args.scale * SETS["coco-mini"].cpu_s
    assert all(budget / 2 < r["cpu_s"] < 3 * budget for r in (clip, pyramid))  # a start of some seconds included
    assert sum(open_source(str(tmp_path / "coco-mini" / "train")).lengths) == 80
    for method in METHODS:
        lines = read_log(tmp_path / "coco-mini" / f"{method}-0")
        assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["pyramid_clip/present/summary"] == 1.0
    assert 0.5 < lines[-1]["pyramid_clip/present/regions"] <= 1.0
    assert of_set("coco-mini", args) == rows  # nothing is trained twice
