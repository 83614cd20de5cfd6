"""The classes of a source: read once, kept while the shard stays as it is, damage named and never silent."""

from __future__ import annotations

import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import UserError
from pretrain.shards import labels as labels_module
from pretrain.shards.index import load_index, sidecar_places
from pretrain.shards.labels import source_labels
from pretrain.shards.source import open_source
from tests.tiny import add


def write_classes(path: Path, classes: list[str | None]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, name in enumerate(classes):
            add(tar, f"{path.stem}-{i}.txt", b"caption" * i)
            if name is not None:
                add(tar, f"{path.stem}-{i}.cls", name.encode())


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("POLYVIEW_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    write_classes(tmp_path / "data" / "a.tar", ["3", None, " 12\n", "0"])
    write_classes(tmp_path / "data" / "b.tar", [])
    write_classes(tmp_path / "data" / "c.tar", ["5"] * 300)
    return tmp_path / "data"


def unread(monkeypatch) -> None:
    def refuse(index):
        raise AssertionError(f"{index.path} was read again")

    monkeypatch.setattr(labels_module, "_read_labels", refuse)


def test_labels_are_those_of_the_members_and_read_once(folder, monkeypatch):
    expected = [3, -1, 12, 0] + [5] * 300
    assert source_labels(open_source(folder)).tolist() == expected
    assert not list(folder.glob(".*"))  # nothing half written is left
    unread(monkeypatch)
    labels = source_labels(open_source(folder))
    assert labels.tolist() == expected
    assert labels.dtype == np.int64


def test_a_shard_that_changed_is_read_again(folder):
    source_labels(open_source(folder))
    time.sleep(0.01)
    write_classes(folder / "a.tar", ["3", "7", "12", "0"])
    assert source_labels(open_source(folder))[:4].tolist() == [3, 7, 12, 0]


def test_kept_labels_that_are_torn_are_made_anew(folder):
    source_labels(open_source(folder))
    kept = sidecar_places(folder / "a.tar", "cls")[0]
    kept.write_bytes(kept.read_bytes()[:50])
    assert source_labels(open_source(folder))[:4].tolist() == [3, -1, 12, 0]


def test_where_nothing_can_be_written_labels_are_read_each_time(folder, monkeypatch):
    load_index(folder / "a.tar")
    monkeypatch.setattr("pretrain.shards.index._write", lambda *_: False)
    for _ in range(2):
        assert source_labels(open_source(folder))[:4].tolist() == [3, -1, 12, 0]
    assert not list(folder.glob("*.cls.npz"))


def test_damaged_classes_count_as_none_and_are_named_each_time(folder, caplog):
    write_classes(folder / "a.tar", ["cat", "1", "-4", "9" * 30])
    for _ in range(2):  # read, and kept
        caplog.clear()
        assert source_labels(open_source(folder))[:4].tolist() == [-1, 1, -1, -1]
        assert "the class of 3 of 304 samples cannot be read" in caplog.text
        assert "a.tar a-0" in caplog.text


def test_a_source_without_classes_has_none(tmp_path):
    write_classes(tmp_path / "a.tar", [None] * 4)
    assert source_labels(open_source(tmp_path)).tolist() == [-1] * 4


def test_a_shard_that_is_gone_is_named(folder):
    source = open_source(folder)
    os.remove(folder / "c.tar")
    with pytest.raises(UserError, match=r"c\.tar"):
        source_labels(source)
