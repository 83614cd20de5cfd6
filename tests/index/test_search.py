"""Search in a published version: what comes out, which encoder may ask, filters, pages."""

from __future__ import annotations

import numpy as np
import pytest

import polyview
from index import open_index
from index.embed.job import Options, embed_shards
from index.errors import BadInput, WrongEncoder
from index.search import opened, show
from index.store.build import build
from index.store.canary import check_canaries
from pretrain.encoder import load
from pretrain.errors import UserError
from tests.index.conftest import HOSTILE, tars
from tests.tiny import picture, write_shards


@pytest.fixture(scope="module")
def index(published, encoder):
    return open_index(published, encoder=encoder)


def brute(index, vector: np.ndarray, k: int) -> list[int]:
    rows = np.concatenate([s.emb for s in index.segments]).astype(np.float64)
    ids = np.concatenate([s.ids for s in index.segments])
    return ids[np.argsort(-(rows @ vector.astype(np.float64)), kind="stable")[:k]].tolist()


def test_vectors_images_and_texts(index, encoder):
    vector = encoder.encode_image([picture(11)])[0]
    assert index.search(vector * 3, 5).ids[0].tolist() == brute(index, vector, 5)
    assert index.search(picture(11), 1).ids[0, 0] == index.id_of_key("s0011")
    hits = index.search(["a red thing", "thing 4, dark"], 7)
    assert hits.scores.shape == hits.ids.shape == (2, 7)
    assert hits.ids[1].tolist() == brute(index, encoder.encode_text(["thing 4, dark"])[0], 7)
    assert index.search("a red thing", 7).ids.tolist() == hits.ids[:1].tolist()


def test_more_asked_than_there_is(index):
    hits = index.search("a red thing", 1000)
    assert hits.ids.shape == (1, 61)
    assert sorted(hits.ids[0]) == sorted(np.concatenate([s.ids for s in index.segments]))


def test_reading_from_the_maps_gives_the_same(published, encoder, index, monkeypatch):
    monkeypatch.setattr(opened, "IN_MEMORY", 0)
    mapped = open_index(published, encoder=encoder)
    assert mapped._bank.parts[0].dtype == np.float16
    for ours, theirs in zip(mapped.search("a red thing", 9), index.search("a red thing", 9)):
        np.testing.assert_array_equal(ours, theirs)


def test_several_segments(collection, encoder, tmp_path):
    data = write_shards(tmp_path / "more", samples=9, shards=1)
    (data / "00000.tar").rename(data / "more.tar")
    embed_shards(encoder, tars(data), tmp_path / "e", Options())
    build(collection, tmp_path / "e")
    collection.publish()
    index = open_index(collection.folder, encoder=encoder)
    assert len(index.segments) == 2
    vector = encoder.encode_image([picture(5)])[0]
    assert index.search(vector, 12).ids[0].tolist() == brute(index, vector, 12)
    pair = index.items(index.search(vector, 2).ids[0])  # the same picture in both tars, lower id first
    assert [(m["shard"], m["key"]) for m in pair] == [("00000.tar", "s0005"), ("more.tar", "s0005")]
    np.testing.assert_array_equal(index.search(vector, 12, {"shard": "more.tar"}).ids[0] >= 62, True)


def test_an_open_index_keeps_its_version(collection, encoder, embeddings):
    index = open_index(collection.folder, encoder=encoder)
    build(collection, embeddings, replace=True)
    collection.publish()
    assert index.manifest.version == "000001"
    assert index.search("a red thing", 3).ids.shape == (1, 3)


@pytest.mark.parametrize(
    ("wanted", "keep"),
    [
        ({"label": 1}, lambda m: m["label"] == 1),
        ({"label": {"in": [0, 2]}}, lambda m: m["label"] in (0, 2)),
        (
            {"label": {"gte": 1, "lt": 2}, "shard": "00001.tar"},
            lambda m: m["label"] == 1 and "1" in m["shard"],
        ),
        ({"key": {"lt": "s0010"}}, lambda m: m["key"] < "s0010"),
        ({"label": 77}, lambda m: False),
        ({"label": {"in": []}}, lambda m: False),
        ({}, lambda m: True),
    ],
)
def test_filters_are_exact(index, wanted, keep):
    everything = index.search("a red thing", 1000)
    expected = [m["id"] for m in index.items(everything.ids[0]) if keep(m)]
    hits = index.search("a red thing", 1000, wanted)
    assert hits.ids[0].tolist() == expected


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"lable": 1}, "no column 'lable'"),
        ({"label": "cat"}, "compared with int"),
        ({"label": True}, "compared with int"),
        ({"key": 3}, "compared with str"),
        ({"label": {"regex": ".*"}}, "no operator 'regex'"),
        ({"label": {"in": 3}}, "list of at most"),
        ({"label": {"in": list(range(10_001))}}, "list of at most"),
        ({"label": 2**70}, "64 bits"),
        ([("label", 1)], "expected"),
    ],
)
def test_wrong_filters_are_refused(index, wanted, says):
    with pytest.raises(BadInput, match=says):
        index.search("a", 3, wanted)


@pytest.mark.parametrize(
    ("query", "k", "says"),
    [
        (np.ones((1, 9), np.float32), 3, "8 wide"),
        (np.zeros((2, 8), np.float32), 3, "row 0"),
        (np.full((1, 8), np.nan, np.float32), 3, "row 0"),
        (np.ones((1, 8), np.int64), 3, "float vectors"),
        (np.ones((1, 8), np.float32), 0, "k must be"),
        ([], 3, "empty list"),
        (b"no picture", 3, "not an image"),
    ],
)
def test_wrong_queries_are_refused(index, query, k, says):
    with pytest.raises(BadInput, match=says):
        index.search(query, k)


def test_unknown_ids_and_keys(index):
    for id in (-1, 60, 62, 10**12):  # 60 is the torn image's: given, but not there
        with pytest.raises(UserError, match=f"no image with id {id}"):
            index.items([id])
    with pytest.raises(UserError, match="no image with key 'nobody'"):
        index.id_of_key("nobody")
    with pytest.raises(BadInput, match="64-bit"):
        index.items([10**20])


def test_the_encoder_is_found_again(published, run):
    index = polyview.open_index(published)
    assert index.search("a red thing", 2).ids.shape == (1, 2)
    assert index.manifest.encoder["checkpoint"] == str(run)


def test_another_encoder_is_refused_with_both_names(published, other_run, encoder):
    other = load(other_run, device="cpu")
    with pytest.raises(WrongEncoder) as caught:
        open_index(published, encoder=other)
    assert encoder.fingerprint[:12] in str(caught.value)
    assert other.fingerprint[:12] in str(caught.value)


def test_an_encoder_that_sees_otherwise_is_refused(published, run):
    """Same weights and fingerprint, other preprocessing: only the kept originals can tell."""

    encoder = load(run, device="cpu")
    plain = encoder.preprocess
    encoder.preprocess = lambda image: plain(image).flip(0)  # BGR
    index = open_index(published)
    with pytest.raises(WrongEncoder, match=r"cosine .* embed it again"):
        check_canaries(encoder, index.segments[0])
    with pytest.raises(WrongEncoder, match="cosine"):
        open_index(published, encoder=encoder)
    assert check_canaries(load(run, device="cpu"), index.segments[0]) > 0.9999


def test_pages_escape_what_strangers_wrote(index):
    item = index.items([index.id_of_key("evil")])
    page = show.page(HOSTILE, "q", [0.5], item, [index.thumbnail(item[0]["id"])])
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "data:image/jpeg;base64,/9j/" in page
    table = show.table([0.5], item)
    assert "\x1b" not in table
    assert "<script>" in table
