"""Many shards as one line of samples, and what the ways of naming them mean."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import UserError
from pretrain.shards.adopt import adopt
from pretrain.shards.index import load_index
from pretrain.shards.source import Shard, Source, open_source
from tests.pretrain.test_shard_index import header_at, overwrite, samples, write_tar


def shards(folder: Path, lengths: list[int], name: str = "{}.tar") -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [write_tar(folder / name.format(i), samples(n)) for i, n in enumerate(lengths)]


def test_locate_and_key_agree_with_counting(tmp_path: Path) -> None:
    lengths = [3, 0, 5, 0, 0, 2, 0]
    source = open_source(str(_folder(tmp_path, lengths)))
    assert source.lengths == lengths
    assert source.samples == 10
    expected = [(shard, row) for shard, n in enumerate(lengths) for row in range(n)]
    shard, row = source.locate(np.arange(10))
    assert list(zip(shard.tolist(), row.tolist())) == expected
    assert [source.key(i) for i in range(10)] == [f"{row:05d}" for _, row in expected]
    assert [part.shape for part in source.locate(np.zeros(0, np.int64))] == [(0,), (0,)]


def _folder(tmp_path: Path, lengths: list[int]) -> Path:
    shards(tmp_path / "data", lengths)
    return tmp_path / "data"


@pytest.mark.parametrize("wrong", [-1, 10, 1 << 62])
def test_ids_outside_the_line_are_refused(tmp_path: Path, wrong: int) -> None:
    source = open_source(str(_folder(tmp_path, [10])))
    with pytest.raises(IndexError, match="0 to 9"):
        source.locate(np.array([0, wrong]))


def test_folder_glob_braces_tar_and_list_name_the_same_shards_in_number_order(tmp_path: Path) -> None:
    paths = shards(tmp_path / "d", [1] * 12)
    folder = str(tmp_path / "d")
    for spec in (
        folder,
        f"{folder}/*.tar",
        f"{folder}/{{0..11}}.tar",
        [f"{folder}/{{0..9}}.tar", f"{folder}/10.tar", f"{folder}/11.tar"],
    ):
        assert open_source(spec).shards == paths
    assert open_source(str(paths[3])).shards == [paths[3]]


def test_padded_braces(tmp_path: Path) -> None:
    paths = shards(tmp_path / "d", [1] * 3, "a-{:03d}.tar")
    assert open_source(f"{tmp_path}/d/a-{{000..002}}.tar").shards == paths


def test_a_missing_shard_is_named_with_the_nearest(tmp_path: Path) -> None:
    shards(tmp_path / "d", [1] * 3, "a-{:03d}.tar")
    with pytest.raises(UserError, match=r"no shard .*a-003\.tar; nearest in .*a-002\.tar"):
        open_source(f"{tmp_path}/d/a-{{000..003}}.tar")
    with pytest.raises(UserError, match=r"nearest in .*: d"):
        open_source(f"{tmp_path}/dd/a-000.tar")


@pytest.mark.parametrize("spec", ["s3://bucket/a.tar", "pipe:cat a.tar"])
def test_urls_and_pipes_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match="local"):
        open_source(spec)


def test_a_folder_without_tars_points_to_those_inside_it(tmp_path: Path) -> None:
    shards(tmp_path / "train", [1])
    with pytest.raises(UserError, match=r"did you mean .*train"):
        open_source(str(tmp_path))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="pretrain pack"):
        open_source(str(tmp_path / "none"))
    with pytest.raises(UserError, match="no shards"):
        open_source([])


def test_lengths_come_from_pack_json_without_opening_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = shards(tmp_path / "d", [3, 4])
    adopt([load_index(path) for path in paths], None)
    monkeypatch.setattr("pretrain.shards.source.index_length", lambda _: pytest.fail("a shard was opened"))
    assert open_source(str(tmp_path / "d")).lengths == [3, 4]
    assert open_source(f"{tmp_path}/d/*.tar").lengths == [3, 4]
    assert Source(paths).lengths == [3, 4]


def test_pack_json_in_another_folder_stands_for_the_tars(tmp_path: Path) -> None:
    paths = shards(tmp_path / "d", [3, 4])
    adopt([load_index(path) for path in paths], tmp_path / "noted")
    source = open_source(str(tmp_path / "noted"))
    assert source.lengths == [3, 4]
    assert [os.path.realpath(shard) for shard in source.shards] == [str(path) for path in paths]


def test_pack_json_that_no_longer_fits_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    paths = shards(folder, [3, 4])
    adopt([load_index(path) for path in paths], None)
    write_tar(folder / "2.tar", samples(1))
    with pytest.raises(UserError, match=r"does not name 2\.tar.*pretrain pack"):
        open_source(str(folder))
    (folder / "2.tar").unlink()
    write_tar(paths[0], samples(5))
    with pytest.raises(UserError, match=r"0\.tar holds 5 samples where 3 were noted"):
        open_source(str(folder)).key(0)
    paths[0].unlink()
    with pytest.raises(UserError, match=r"no shard .*0\.tar, which .*pack\.json names"):
        open_source(str(folder))
    for wrong in ("{", "[]", json.dumps({"shards": [{"name": "0.tar"}]})):
        (folder / "pack.json").write_text(wrong)
        with pytest.raises(UserError, match=r"pack\.json is damaged"):
            open_source(str(folder))


def test_only_the_indexes_in_use_are_kept(tmp_path: Path) -> None:
    source = Source(shards(tmp_path / "d", [2] * 5), cached=2)
    for shard in (0, 1, 2, 1, 3):
        source.index(shard)
    assert list(source._indexes) == [1, 3]
    assert source.index(1) is source.index(1)


def test_damage_is_told_once_and_the_rest_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = shards(tmp_path / "d", [10])
    overwrite(path, header_at(path, "00004.jpg"), b"\xff")
    source = Source([path], cached=0)
    assert source.samples == 9
    with caplog.at_level(logging.WARNING):
        assert [source.key(i) for i in range(9)] == [f"{i:05d}" for i in range(10) if i != 4]
    assert len(caplog.records) == 1
    assert "0.tar is damaged" in caplog.text


def test_many_shards_are_located_fast(tmp_path: Path) -> None:
    source = Source([Shard(tmp_path / str(i), 10_000) for i in range(20_000)])  # no file touched
    shard, row = source.locate(np.array([0, 9_999, 10_000, 199_999_999]))
    assert shard.tolist() == [0, 0, 1, 19_999]
    assert row.tolist() == [0, 9_999, 0, 9_999]
