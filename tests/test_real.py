"""The whole way on real photographs, small: pack, train, retrieve, find, name; the commands of the README."""

from __future__ import annotations

import json

import pytest

import polyview
from downstream.__main__ import main as downstream
from index.__main__ import main as index
from pretrain.__main__ import main as pretrain

pytestmark = pytest.mark.real
SMALL = ["world=1", "steps=6", "global_batch=24", "model.image_size=64", "checkpoint.every=3", "log.tensorboard=false"]


def metrics(folder, task: str) -> dict[str, float]:
    (file,) = folder.glob(f"{task}*.json")
    return json.loads(file.read_text())["metrics"]


@pytest.fixture(scope="module")
def run(real_data, tmp_path_factory):
    """Sixty Flickr photographs packed, twenty of them held out; a few steps on the others."""
    folder = tmp_path_factory.mktemp("real")
    flickr = real_data / "flickr1k"
    table = [str(flickr / "captions.tsv"), "--images", str(flickr / "images"), "--out", str(folder / "pairs")]
    assert pretrain(["pack", *table, "--limit", "60", "--holdout", "20"]) == 0
    source = f"data.sources.0.shards={folder / 'pairs' / 'train'}"
    assert pretrain(["photographs", source, f"output={folder / 'run'}", *SMALL]) == 0
    return folder


def test_held_out_photographs_are_retrieved_in_the_five_caption_form(run):
    assert downstream(["retrieval", str(run / "run"), str(run / "pairs" / "test"), "--out", str(run / "results")]) == 0
    found = metrics(run / "results", "zeroshot_retrieval")
    assert 0 <= found["image_retrieval_recall@1"] <= found["image_retrieval_recall@10"] <= 1
    (file,) = (run / "results").glob("zeroshot_retrieval*.json")
    assert "100" in json.dumps(json.loads(file.read_text())["details"])  # twenty photographs, a hundred captions


def test_a_photograph_finds_itself_and_text_finds_something(run, real_data):
    embeddings, collection = str(run / "embeddings"), str(run / "collection")
    assert index(["embed", str(run / "run"), str(run / "pairs" / "test"), "--out", embeddings]) == 0
    assert index(["build", collection, "--from", embeddings]) == 0
    assert index(["publish", collection]) == 0
    opened = polyview.open_index(collection)
    key = opened.items([int(opened.search(["a dog"], k=3).ids[0, 0])])[0]["key"]
    photograph = next((real_data / "flickr1k" / "images").glob(f"{key}.*"))
    hits = opened.search([photograph], k=1)
    assert opened.items(hits.ids[0])[0]["key"] == key
    assert hits.scores[0, 0] > 0.999


def test_coco_with_boxes_is_packed_and_retrieved(run, real_data, tmp_path):
    coco = real_data / "coco-mini"
    captions = str(coco / "annotations" / "captions_val2017.json")
    images = ["--images", str(coco / "val2017"), "--limit", "30"]
    assert pretrain(["pack", captions, *images, "--out", str(tmp_path / "coco")]) == 0
    assert downstream(["retrieval", str(run / "run"), str(tmp_path / "coco"), "--out", str(tmp_path / "results")]) == 0
    assert metrics(tmp_path / "results", "zeroshot_retrieval")["text_retrieval_recall@10"] >= 0


def test_cifar_inside_a_tar_gz_is_packed_and_named_by_its_neighbours(run, real_data, tmp_path):
    cifar = str(real_data / "cifar10-24k.tar.gz")
    for split, n in (("train", 400), ("test", 100)):
        out = ["--out", str(tmp_path / split), "--limit", str(n)]
        assert pretrain(["pack", cifar, "--subdir", split, *out]) == 0
    sets = ["--train", str(tmp_path / "train"), "--test", str(tmp_path / "test")]
    assert downstream(["knn", str(run / "run"), *sets, "--out", str(tmp_path / "results")]) == 0
    assert metrics(tmp_path / "results", "knn")["k20_acc1"] > 0.12  # ten classes, and even six steps leave colours
