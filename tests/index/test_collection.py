"""Versions: append, replace, rollback, two publishers, damage found, stable ids."""

from __future__ import annotations

import shutil
from multiprocessing import get_context

import pytest

from index.embed.job import Options, embed_shards
from index.errors import DamagedCollection, StaleParent, WrongEncoder
from index.store.build import build
from index.store.collection import Collection
from pretrain.encoder import load
from pretrain.errors import UserError
from tests.index.conftest import tars
from tests.tiny import write_shards


@pytest.fixture
def more(encoder, tmp_path):
    """Embeddings of other tars."""
    data = write_shards(tmp_path / "more", samples=9, shards=1)
    (data / "00000.tar").rename(data / "more.tar")
    embed_shards(encoder, tars(data), tmp_path / "more-e", Options())
    return tmp_path / "more-e"


def ids_by_key(collection: Collection, version: str | None = None) -> dict[tuple[str, str], int]:
    _, segments = collection.open(version)
    return {(m["shard"], m["key"]): int(i) for s in segments for i, m in zip(s.ids, s.meta.to_pylist(), strict=True)}


def test_a_version_is_not_served_before_it_is_published(collection, more):
    build(collection, more)
    assert collection.current() == "000001"
    assert collection.open()[0].rows == 61
    assert collection.publish() == ("000001", "000002")
    assert collection.open()[0].rows == 70


def test_append_shares_segments_and_ids(collection, more):
    first = ids_by_key(collection)
    build(collection, more)
    collection.publish()
    second = ids_by_key(collection)
    assert first.items() <= second.items()
    assert len(set(second.values())) == 70
    old, new = collection.manifest("000001"), collection.manifest("000002")
    assert new.segments[0] == old.segments[0]
    assert len(new.segments) == 2


def test_building_again_adds_nothing(collection, embeddings):
    built = build(collection, embeddings)
    assert (built.manifest, built.known) == (None, 3)
    assert collection.versions() == ["000001"]


def test_replacing_the_encoder_keeps_ids(collection, other_run, shards, tmp_path):
    other = load(other_run, device="cpu")
    embed_shards(other, tars(shards), tmp_path / "e", Options(checkpoint=str(other_run)))
    with pytest.raises(WrongEncoder, match="--replace"):
        build(collection, tmp_path / "e")
    build(collection, tmp_path / "e", replace=True)
    collection.publish()
    assert collection.open()[0].fingerprint == other.fingerprint
    assert ids_by_key(collection) == ids_by_key(collection, "000001")


def test_ids_of_tars_taken_out_are_not_given_again(collection, more):
    before = set(ids_by_key(collection).values())
    build(collection, more, replace=True)
    collection.publish()
    assert len(ids_by_key(collection)) == 9
    assert not before & set(ids_by_key(collection).values())


def test_rollback_and_forward_again(collection, more):
    build(collection, more)
    collection.publish()
    assert collection.publish("000001") == ("000002", "000001")
    assert collection.open()[0].rows == 61
    assert collection.publish("000002") == ("000001", "000002")


def test_a_stale_parent_is_refused(collection, more, embeddings):
    build(collection, more)
    build(collection, embeddings, replace=True)  # both on version 1
    collection.publish("000002")
    with pytest.raises(StaleParent, match="built on 000001, but 000002 is current"):
        collection.publish("000003")
    assert collection.current() == "000002"


def _publish(folder, version, start, answers):
    start.wait()
    try:
        Collection(folder).publish(version)
        answers.put((version, "published"))
    except StaleParent:
        answers.put((version, "refused"))


def test_of_two_publishers_one_wins(collection, more, embeddings):
    build(collection, more)
    build(collection, embeddings, replace=True)
    context = get_context("spawn")
    start, answers = context.Event(), context.Queue()
    names = ("000002", "000003")
    both = [context.Process(target=_publish, args=(collection.folder, v, start, answers)) for v in names]
    for process in both:
        process.start()
    start.set()
    said = dict(answers.get(timeout=60) for _ in both)
    for process in both:
        process.join()
    assert sorted(said.values()) == ["published", "refused"]
    assert said[collection.current()] == "published"


@pytest.mark.parametrize("name", ["emb.npy", "ids.npy", "meta.parquet", "thumbs.bin", "canaries.parquet"])
def test_one_flipped_bit_is_found_at_open_and_at_publish(collection, name):
    collection.open()  # checked and remembered
    path = next(collection.segments.glob(f"s-*/{name}"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedCollection, match=f"{name} was altered"):
        collection.open()
    with pytest.raises(DamagedCollection, match=f"{name} was altered"):
        collection.publish()


def test_a_file_cut_short_or_gone_is_named(collection):
    path = next(collection.segments.glob("s-*/emb.npy"))
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(DamagedCollection, match=f"emb.npy has {len(data) - 1} bytes instead of {len(data)}"):
        collection.open()
    path.unlink()
    with pytest.raises(DamagedCollection, match=r"emb\.npy is missing"):
        collection.open()


def test_building_again_mends_a_damaged_segment(collection, embeddings):
    path = next(collection.segments.glob("s-*/emb.npy"))
    path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8)
    build(collection, embeddings, replace=True)
    collection.publish()
    assert collection.open()[0].version == "000002"
    assert collection.open("000001")[0].rows == 61


@pytest.mark.parametrize("torn", ["", "0000", "000009\n", "../../etc", "\0\0\0"])
def test_a_torn_current_says_how_to_go_on(collection, torn):
    (collection.folder / "CURRENT").write_text(torn)
    with pytest.raises(DamagedCollection, match="publish one of 000001"):
        collection.open()
    collection.publish("000001")
    assert collection.open()[0].rows == 61


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"rows": 61', '"rows": 60', "are not 62 members"),
        ('"schema": 1', '"schema": 2', "update polyview"),
        ('"path": "emb.npy"', '"path": "../../CURRENT"', "no segment has"),
        ('"id": "s-', '"id": "../s-', "no segment's name"),
        ("{", "", "cannot be read"),
    ],
)
def test_a_manifest_that_was_meddled_with_is_refused(collection, old, new, says):
    path = collection.folder / "versions" / "000001" / "MANIFEST.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DamagedCollection, match=says):
        collection.open()


def test_nothing_there_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="index build"):
        Collection(tmp_path).open()
    with pytest.raises(UserError, match="index build"):
        Collection(tmp_path).publish()
    with pytest.raises(UserError, match="index embed"):
        build(Collection(tmp_path), tmp_path)


def test_the_same_units_give_the_same_segment(embeddings, collection, tmp_path):
    copy = shutil.copytree(embeddings, tmp_path / "copy")
    fresh = Collection(tmp_path / "fresh")
    build(fresh, copy)
    assert [s["id"] for s in fresh.manifest("000001").segments] == [
        s["id"] for s in collection.manifest("000001").segments
    ]


def test_32_originals_are_kept_of_all_tars(collection):
    _, [segment] = collection.open()
    rows, originals = segment.canaries()
    assert len(rows) == len(originals) == 32
    assert {segment.meta["shard"][int(r)].as_py() for r in rows} == {"00000.tar", "00001.tar", "00002.tar"}
