"""Embedding: counts that add up, shares of ranks, what is skipped and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from index.embed.job import Options, embed_shards, rank_and_world
from index.errors import WrongEncoder
from index.store.build import build
from index.store.collection import Collection
from index.store.plan import planned_units
from index.store.tables import read_table
from index.store.thumbs import Thumbs
from pretrain.encoder import load
from pretrain.errors import UserError
from tests.index.conftest import HOSTILE, save_run, tars


def unit_of(embeddings, tar: str):
    units, _ = planned_units(embeddings)
    return next((embeddings / "units" / n, d) for n, d in units.items() if d.shard.endswith(tar))


def test_every_member_is_a_row_or_skipped_with_a_reason(embeddings):
    units, missing = planned_units(embeddings)
    assert not missing
    assert sum(d.members for d in units.values()) == 62
    assert sum(d.rows for d in units.values()) == 61
    folder, done = unit_of(embeddings, "00002.tar")
    assert sum(done.skipped.values()) == 1
    skipped = read_table(folder / "skipped.parquet").to_pylist()
    assert [s["key"] for s in skipped] == ["torn"]
    assert skipped[0]["reason"]


def test_vectors_belong_to_their_samples(embeddings, encoder, shards):
    folder, done = unit_of(embeddings, "00001.tar")
    meta = read_table(folder / "meta.parquet").to_pylist()
    images, texts = np.load(folder / "images.npy"), np.load(folder / "texts.npy")
    owners = np.load(folder / "text_rows.npy")
    assert images.dtype == texts.dtype == np.float16
    tar = (shards / "00001.tar").read_bytes()
    for row in (0, 7, done.rows - 1):
        original = tar[meta[row]["offset"] : meta[row]["offset"] + meta[row]["size"]]
        assert encoder.encode_image([original])[0] @ images[row] > 0.9999
        mine = texts[owners == row].astype(np.float32)
        expected = encoder.encode_text(meta[row]["captions"])
        np.testing.assert_allclose(mine, expected, atol=1e-3)
        assert meta[row]["label"] == int(meta[row]["key"][1:]) % 3
        assert Thumbs(folder).read(row)[:3] == b"\xff\xd8\xff"


def test_hostile_captions_are_kept_as_they_are(embeddings):
    folder, _ = unit_of(embeddings, "00002.tar")
    captions = {m["key"]: m["captions"] for m in read_table(folder / "meta.parquet").to_pylist()}
    assert captions["evil"] == [HOSTILE]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_together_do_what_one_does(encoder, shards, embeddings, tmp_path, world):
    members = 0
    for rank in range(world):
        done = embed_shards(encoder, tars(shards), tmp_path, Options(batch=7), rank=rank, world=world)
        members += done.members
    assert members == 62
    assert planned_units(tmp_path)[0].keys() == planned_units(embeddings)[0].keys()


def test_missing_ranks_are_noticed_by_build(encoder, shards, tmp_path):
    embed_shards(encoder, tars(shards), tmp_path / "e", Options(), rank=1, world=3)
    with pytest.raises(UserError, match=r"2 tar\(s\) are not embedded yet"):
        build(Collection(tmp_path / "c"), tmp_path / "e")
    built = build(Collection(tmp_path / "c"), tmp_path / "e", partial=True)
    assert built.manifest is not None
    assert built.manifest.rows == planned_units(tmp_path / "e")[0].popitem()[1].rows


def test_images_only(encoder, shards, tmp_path):
    counts = embed_shards(encoder, tars(shards)[:1], tmp_path, Options(texts=False))
    assert counts.texts == 0
    assert counts.rows == counts.members
    again = embed_shards(encoder, tars(shards)[:1], tmp_path, Options(texts=True))
    assert again.texts > 0
    assert planned_units(tmp_path)[0].popitem()[1].texts == again.texts  # of two units the one with texts


def test_an_encoder_of_nan_keeps_nothing_and_says_so(shards, tmp_path):
    encoder = load(save_run(tmp_path / "run", seed=0, nan=True), device="cpu")
    counts = embed_shards(encoder, tars(shards)[:1], tmp_path / "e", Options())
    assert counts.rows == counts.texts == 0
    assert counts.skipped == {"embedding is not finite": counts.members}
    collection = Collection(tmp_path / "c")
    build(collection, tmp_path / "e")
    collection.publish()
    assert collection.open()[0].rows == 0


def test_one_encoder_a_folder(embeddings, other_run, shards, tmp_path):
    copy = shutil.copytree(embeddings, tmp_path / "e")
    with pytest.raises(WrongEncoder, match="folder of its own"):
        embed_shards(load(other_run, device="cpu"), tars(shards), copy, Options())


def test_a_rewritten_tar_is_embedded_again(encoder, shards, tmp_path):
    data = shutil.copytree(shards, tmp_path / "data")
    embed_shards(encoder, tars(data), tmp_path / "e", Options())
    shutil.copyfile(data / "00000.tar", data / "00001.tar")
    counts = embed_shards(encoder, tars(data), tmp_path / "e", Options())
    assert (counts.tars, counts.known) == (3, 2)
    assert len(planned_units(tmp_path / "e")[0]) == 3  # the unit of the tar's earlier state is left out


def test_a_moved_folder_is_known(encoder, shards, tmp_path):
    data = shutil.copytree(shards, tmp_path / "data")
    embed_shards(encoder, tars(data), tmp_path / "e", Options())
    data.rename(tmp_path / "moved")
    assert embed_shards(encoder, tars(tmp_path / "moved"), tmp_path / "e", Options()).known == 3


def test_rank_comes_from_the_environment():
    assert rank_and_world({}) == (0, 1)
    assert rank_and_world({"RANK": "1", "WORLD_SIZE": "4"}) == (1, 4)
    assert rank_and_world({"SLURM_PROCID": "2", "SLURM_NTASKS": "3"}) == (2, 3)
    with pytest.raises(UserError, match="RANK=4"):
        rank_and_world({"RANK": "4", "WORLD_SIZE": "4"})


def test_done_says_where_it_came_from(embeddings, run):
    folder, _ = unit_of(embeddings, "00000.tar")
    done = json.loads((folder / "DONE.json").read_text())
    assert done["encoder"]["checkpoint"] == str(run)
    assert len(done["fingerprint"]) == 64
