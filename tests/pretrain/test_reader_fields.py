"""Texts, tags and regions that a sample may lack: what a batch holds of them, and what a malformed member costs."""

from __future__ import annotations

import io
import json
import logging

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from pretrain.errors import UserError
from pretrain.order import SampleOrder
from pretrain.reader import Batch, Reader
from pretrain.shards.objects import SceneObject
from pretrain.shards.roi import rows_bytes
from pretrain.shards.source import Source, open_source
from pretrain.views.geometry import UNIFORMS, Box, crop_box, random_resized_crop
from pretrain.views.regions import in_crop
from pretrain.views.spec import ImageView, RegionView, TextView
from tests.pretrain.test_reader import TOKENIZER, assert_same, picture, write_source

SAMPLES = 36
VIEW = ImageView("local", 16, scale=(0.3, 0.9), flip=0.5)
CAPTION = TextView()
SECOND, THIRD = (TextView(f"caption+{n}", after=n) for n in (1, 2))
SUMMARY = TextView("summary", "summary.txt", required=False)
TAGS = TextView("tags", "json", form="tags", required=False)
TEXTS = (CAPTION, SECOND, THIRD, SUMMARY, TAGS)
BOXES = RegionView("boxes", "local", most=3)
STORED = RegionView("stored", "local", most=4, stored_dim=6)
REGIONS = (BOXES, STORED)


def objects(i: int) -> list[SceneObject]:
    rng = np.random.default_rng(i)
    return [
        SceneObject((*low.tolist(), *(low + rng.uniform(0.2, 0.6, 2)).tolist()), f"thing {n}", ("red",), float(score))
        for n, (low, score) in enumerate(zip(rng.uniform(0, 0.4, (i % 7, 2)), rng.random(i % 7)))
    ]


def stored(i: int) -> np.ndarray:
    return np.random.default_rng(i).normal(size=(i % 6, 10)).astype(np.float16)


def rich(i: int) -> dict[str, bytes]:
    """A sample with everything; i % 3 + 1 captions, i % 7 objects and i % 6 stored rows."""
    return {
        "jpg": picture(i),
        "txt": "\n".join(f"caption {n} of {i}" for n in range(i % 3 + 1)).encode(),
        "summary.txt": f"summary of {i}".encode(),
        "json": json.dumps({"objects": [o.record() for o in objects(i)]}).encode(),
        "roi.npy": rows_bytes(stored(i)),
    }


def source_of(folder, changed: dict[int, dict[str, bytes]] | None = None, samples: int = SAMPLES) -> Source:
    return write_source(folder, (samples,), {i: (changed or {}).get(i, rich(i)) for i in range(samples)})


def read(source: Source, stop: int = 3, **options) -> list[Batch]:
    order = SampleOrder([source.lengths], seed=3, global_batch=12, block=4, window=16)
    options = {"seed": 3, "threads": 2, "region_views": REGIONS, **options}
    with Reader([source], order, (VIEW,), TEXTS, TOKENIZER, **options) as reader:
        return list(reader.stream(0, stop))


def rows(batches: list[Batch]) -> dict[int, Batch]:
    """Every sample of the batches as a batch of its own, by number."""
    return {int(batch.keys[i][1:]): batch.rows(i, i + 1) for batch in batches for i in range(len(batch))}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    return source_of(tmp_path_factory.mktemp("fields") / "s")


# ----------------------------------------------------------------------------------------------------
# what a batch holds


def test_every_row_has_what_its_sample_holds(source):
    found = rows(read(source))
    assert len(found) == SAMPLES
    for i, row in found.items():
        assert row.present.keys() == {"caption+1", "caption+2", "summary", "tags", "boxes", "stored"}
        assert row.captions["summary"] == [f"summary of {i}"]
        best = sorted(objects(i), key=lambda o: -o.score)
        assert row.captions["tags"] == [", ".join(f"red {o.label}" for o in best)]
        assert row.present["tags"].item() == bool(best)
        count = i % 3 + 1
        drawn = int(row.captions["caption"][0].split()[1])
        for view in (SECOND, THIRD):
            there = view.after < count
            assert row.present[view.name].item() is there
            expected = f"caption {(drawn + view.after) % count} of {i}" if there else ""
            assert row.captions[view.name] == [expected]
            assert row.tokens[view.name].any().item() is there
        assert row.damaged == []
        assert row.weight.item() == 1


def test_stored_rows_come_as_they_are(source):
    for i, row in rows(read(source)).items():
        boxes, features, mask = row.regions["stored"]
        count = min(len(stored(i)), 4)
        assert (boxes.shape, features.shape, mask.shape) == ((1, 4, 4), (1, 4, 10), (1, 4))
        assert features.dtype == torch.float16
        assert mask[0].tolist() == [n < count for n in range(4)]
        assert np.array_equal(features[0, :count].numpy(), stored(i)[:count])
        assert not features[0, count:].any()
        assert not boxes.any()
        assert row.present["stored"].item() == (count > 0)


def painted(width: int, height: int, box: list[int]) -> bytes:
    """A black PNG with one white box."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def paint_box(pixels: np.ndarray) -> list[int]:
    """x1, y1, x2, y2 of a white box in (S, S) pixels: where a row or column is over half as white as the whitest."""
    edges = []
    for line in (pixels.sum(0), pixels.sum(1)):
        (white,) = np.nonzero(line > line.max() / 2)
        edges.append((white[0], white[-1] + 1))
    (x1, x2), (y1, y2) = edges
    return [x1, y1, x2, y2]


def test_boxes_are_where_the_crop_shows_them(tmp_path):
    """The first object of every sample is painted: the reader's first box holds the paint of the reader's crop."""
    changed = {}
    for i in range(SAMPLES):
        rng = np.random.default_rng(i)
        x, y = rng.integers(0, (86, 79)).tolist()
        box = [x, y, x + 15, y + 12]
        first = SceneObject((x / 100, y / 90, (x + 15) / 100, (y + 12) / 90), "paint", (), 0.9)
        whole = SceneObject((0.0, 0.0, 1.0, 1.0), "all", (), 0.1)
        told = json.dumps({"objects": [whole.record(), first.record()]}).encode()
        changed[i] = {"png": painted(100, 90, box), "txt": b"a\nb", "json": told}
    view = ImageView("local", 32, scale=(0.6, 0.9), flip=0.5, interpolation="bilinear")  # more than half of the whole
    source = source_of(tmp_path / "s", changed)
    order = SampleOrder([source.lengths], seed=3, global_batch=12)
    with Reader([source], order, (view,), (), None, region_views=(BOXES,), seed=3) as reader:
        found = rows(list(reader.stream(0, 3)))
    counts = []
    for row in found.values():
        boxes, features, mask = row.regions["boxes"]
        count = int(mask.sum())
        assert (boxes.shape, boxes.dtype, features.shape, mask.shape) == ((1, 3, 4), torch.float32, (1, 3, 0), (1, 3))
        assert mask[0].tolist() == [n < count for n in range(3)]
        assert row.present["boxes"].item()
        assert boxes[0, count - 1 :].tolist() == [[0, 0, 1, 1], *[[0, 0, 0, 0]] * (3 - count)]
        if count == 2:
            pixels = row.images["local"][0, 0].numpy() / 255
            assert paint_box(pixels) == pytest.approx(boxes[0, 0].numpy() * 32, abs=1)
        counts.append(count)
    assert counts.count(2) > 20
    assert set(counts) == {1, 2}


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_boxes_match_the_pixels_of_the_crop(flip):
    rng = np.random.default_rng(0)
    view = ImageView("v", 64, scale=(0.1, 0.9), ratio=(1 / 2, 2.0), flip=flip, interpolation="bilinear")
    seen = 0
    for _ in range(300):
        height, width = rng.integers(80, 300, 2).tolist()
        (y1, y2), (x1, x2) = (np.sort(rng.choice(side + 1, 2, replace=False)).tolist() for side in (height, width))
        painted = np.zeros((height, width, 3), np.uint8)
        painted[y1:y2, x1:x2] = 255
        u = rng.random(UNIFORMS)
        crop = crop_box(height, width, view, u)
        box = np.array([[x1 / width, y1 / height, x2 / width, y2 / height]])
        found = in_crop(box, height, width, crop, flipped=flip == 1)
        part = painted[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        share = part.sum() / painted.sum()
        assert len(found) == (share >= 0.5)
        if not len(found):
            continue
        seen += 1
        pixels = random_resized_crop(painted, view, u)[0].numpy() / 255
        assert paint_box(pixels) == pytest.approx(found[0] * 64, abs=1)
    assert 60 < seen < 240


def test_half_a_box_is_shown_and_less_is_not():
    crop = Box(0, 0, 10, 10)  # of 10 x 20 pixels: the left half
    boxes = np.array([[0.4, 0, 0.6, 1], [0.4, 0, 0.61, 1], [0.6, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0.1, 0.1]])
    found = in_crop(boxes, 10, 20, crop, flipped=False)
    assert found == pytest.approx(np.array([[0.8, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0.2, 0.1]]))
    mirrored = in_crop(boxes, 10, 20, crop, flipped=True)
    assert mirrored == pytest.approx(np.array([[0, 0, 0.2, 1], [0, 0, 1, 1], [0.8, 0, 1, 0.1]]))
    assert in_crop(np.empty((0, 4)), 10, 20, crop, flipped=True).shape == (0, 4)


# ----------------------------------------------------------------------------------------------------
# what is missing, and what is malformed


PLAIN = {"jpg": picture(1), "txt": b"only a caption"}


def test_a_sample_with_a_caption_alone_is_a_good_one(tmp_path):
    found = rows(read(source_of(tmp_path / "s", {5: PLAIN})))
    row = found[5]
    assert row.weight.item() == 1
    assert row.damaged == []
    assert not any(there.item() for there in row.present.values())
    for view in TEXTS[1:]:
        assert row.captions[view.name] == [""]
        assert not row.tokens[view.name].any()
    assert row.tokens["caption"].any()
    assert not any(part.any() for regions in row.regions.values() for part in regions)
    everything = rows(read(source_of(tmp_path / "whole")))
    for i in everything.keys() - {5}:
        assert_same(found[i], everything[i])


ABSENT = {"json": ("tags", "boxes"), "roi.npy": ("stored",), "summary.txt": ("summary",)}
MALFORMED = {
    3: ("json", b"{", "not JSON"),
    8: ("json", b'{"objects": 3}', "objects is no list but 3"),
    10: ("json", json.dumps({"objects": [{"box": [0, 0, 9, 9], "label": "x"}]}).encode(), "1 of its objects: object 0"),
    11: ("roi.npy", rows_bytes(np.zeros((2, 9), np.float16)), "an array of (2, 9) float16, should be (n, 10)"),
    17: ("roi.npy", b"\x80\x04N.", "not an array of numpy's .npy form"),
    23: ("summary.txt", b"caf\xe9", "caption is not UTF-8 (.summary.txt, byte 3)"),
}


def test_a_malformed_member_costs_itself_and_is_told(tmp_path, caplog):
    changed = {i: {**rich(i), member: data} for i, (member, data, _) in MALFORMED.items()}
    told: list[dict] = []
    with caplog.at_level(logging.WARNING):
        found = rows(read(source_of(tmp_path / "s", changed), max_damaged=0, on_damage=told.append))
    assert sorted(note["key"] for note in told) == [f"s{i:03d}" for i in sorted(MALFORMED)]
    for note in told:
        member, _, reason = MALFORMED[int(note["key"][1:])]
        assert note["left_out"] == member
        assert note["reason"].startswith(reason)
        assert note["shard"].endswith("0.tar")
    everything = rows(read(source_of(tmp_path / "whole")))
    for i, row in found.items():
        assert row.weight.item() == 1
        absent = ABSENT[MALFORMED[i][0]] if i in MALFORMED else ()
        for name, there in row.present.items():
            assert there.item() == (name not in absent and everything[i].present[name].item())
        if i in MALFORMED:
            assert row.damaged[0]["row"] == 0
            assert torch.equal(row.images["local"], everything[i].images["local"])
            assert row.captions["caption"] == everything[i].captions["caption"]
        else:
            assert_same(row, everything[i])
    assert len(caplog.records) == 1, "the first is warned of, the tenth would be"
    assert "is used without what its ." in caplog.text


def test_objects_beside_a_wrong_one_are_used(tmp_path):
    told = [{"box": [0, 0, 1, 1], "label": "good"}, {"box": [0, 0, 0, 0], "label": "flat"}]
    row = rows(read(source_of(tmp_path / "s", {5: rich(5) | {"json": json.dumps({"objects": told}).encode()}})))[5]
    assert row.captions["tags"] == ["good"]
    assert [note["reason"] for note in row.damaged] == [
        "1 of its objects: object 1: box [0.0, 0.0, 0.0, 0.0] has no area"
    ]


def test_a_fault_of_every_sample_fills_no_disk(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("pretrain.reader.damage.NOTED", 20)
    told: list[dict] = []
    source = source_of(tmp_path / "s", {i: rich(i) | {"json": b"none"} for i in range(SAMPLES)})
    assert len(read(source, 9, max_damaged=0, on_damage=told.append)) == 9
    assert len(told) == 20
    assert [record.args[-2] for record in caplog.records] == [1, 10, 100]


def test_what_is_required_and_missing_is_damage(tmp_path):
    source = source_of(tmp_path / "s", {5: PLAIN, 7: rich(7) | {"json": b"{"}}, samples=12)
    order = SampleOrder([source.lengths], seed=0, global_batch=12)
    texts = (CAPTION, TextView("tags", "json", form="tags"))
    with Reader([source], order, (VIEW,), texts, TOKENIZER, seed=0) as reader:
        batch = reader.batch(0)
    reasons = {damage["key"]: damage["reason"] for damage in batch.damaged}
    assert reasons == {
        "s000": "no tags: .json lists no objects",
        "s005": "no tags: .json lists no objects",
        "s007": "no tags: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    }
    assert batch.present == {}


def test_damaged_rows_show_the_stand_ins_texts_and_regions(tmp_path):
    source = source_of(tmp_path / "s", {13: rich(13) | {"cls": b"cat"}, 20: rich(20) | {"jpg": b""}})
    shown = 0
    for batch in read(source, max_damaged=1):
        for damage in batch.damaged:
            row = damage["row"]
            stand_in = next((row + k) % 12 for k in range(12) if batch.weight[(row + k) % 12])
            a, b = batch.rows(row, row + 1), batch.rows(stand_in, stand_in + 1)
            assert a.captions == b.captions
            for x, y in ((a.images, b.images), (a.tokens, b.tokens), (a.present, b.present)):
                assert all(torch.equal(x[name], y[name]) for name in x)
            assert all(all(map(torch.equal, a.regions[name], b.regions[name])) for name in a.regions)
            shown += 1
    assert shown == 2
    (batch,) = read(
        source_of(tmp_path / "none", {i: {"jpg": b"", "txt": b"x"} for i in range(12)}, 12), 1, max_damaged=1
    )
    assert not any(there.any() for there in batch.present.values())
    assert not any(part.any() for regions in batch.regions.values() for part in regions)
    assert not batch.tokens["summary"].any()


# ----------------------------------------------------------------------------------------------------
# draws, threads, places


def test_the_first_caption_is_drawn_as_without_the_others(source):
    order = SampleOrder([source.lengths], seed=3, global_batch=12, block=4, window=16)
    with Reader([source], order, (VIEW,), (CAPTION,), TOKENIZER, seed=3) as reader:
        for alone, whole in zip(reader.stream(0, 9), read(source, 9), strict=True):
            assert alone.captions["caption"] == whole.captions["caption"]
            assert torch.equal(alone.images["local"], whole.images["local"])
            assert alone.present == {}


@pytest.mark.parametrize("options", [{"threads": 1, "prefetch": 0}, {"threads": 4}, {"cache_bytes": 0}])
def test_threads_and_cache_change_nothing(source, options):
    for a, b in zip(read(source, 6), read(source, 6, **options), strict=True):
        assert_same(a, b)


def test_single_steps_and_ranks_are_the_stream(source):
    whole = read(source, 6)
    order = SampleOrder([source.lengths], seed=3, global_batch=12, block=4, window=16)
    for rank in range(2):
        options = {"seed": 3, "region_views": REGIONS, "rank": rank, "world": 2}
        with Reader([source], order, (VIEW,), TEXTS, TOKENIZER, **options) as reader:
            for step in (4, 1, 5):
                assert_same(reader.batch(step), whole[step].rows(6 * rank, 6 * rank + 6))


def test_to_moves_what_rows_cut(source):
    part = read(source, 1)[0].rows(2, 7).to("meta")
    assert {tensor.device.type for tensor in part.present.values()} == {"meta"}
    for regions in part.regions.values():
        assert [tensor.shape[0] for tensor in regions] == [5, 5, 5]
        assert {tensor.device.type for tensor in regions} == {"meta"}


def test_shards_of_webdatasets_own_writer(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as tar:
        for i in range(12):
            told = {"objects": [o.record() for o in objects(i)], "key": f"s{i:03d}"}
            texts = {"txt": f"caption 0 of {i}", "summary.txt": f"summary of {i}"}
            tar.write({"__key__": f"s{i:03d}", "jpg": picture(i), **texts, "json": told, "roi.npy": stored(i)})
    ours = rows(
        read(
            source_of(tmp_path / "ours", {i: rich(i) | {"txt": f"caption 0 of {i}".encode()} for i in range(12)}, 12), 1
        )
    )
    theirs = rows(read(open_source(tmp_path / "0.tar"), 1))
    assert ours.keys() == theirs.keys() == set(range(12))
    for i, row in theirs.items():
        assert row.present["summary"].item()
        for name in ("tags", "boxes", "stored"):
            assert row.present[name].item() == ours[i].present[name].item()
        assert_same(row, ours[i])


def test_a_region_view_needs_its_image_view(source):
    with pytest.raises(UserError, match="image view other, which no objective asks for"):
        read(source, region_views=(RegionView("r", "other"),))
    with pytest.raises(UserError, match="two views are named local"):
        read(source, region_views=(RegionView("local", "local"),))
