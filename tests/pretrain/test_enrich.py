"""New shards beside old ones: what each sample gains, what it keeps, and what happens to those that are damaged."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torchvision.models import get_model

from pretrain import cli
from pretrain.__main__ import VERBS
from pretrain.shards import enrich as enriching
from pretrain.shards.objects import SceneObject, read_objects
from pretrain.shards.roi import read_rows
from pretrain.shards.source import open_source
from tests.pretrain.test_reader import picture, write_tar

WORDS = "A red bus. It stands by the road, near a tree and a house with a green door and two windows open."
MODEL = "fasterrcnn_mobilenet_v3_large_320_fpn"


def run(*argv: object) -> int:
    return cli.main("pretrain", "", VERBS, [str(a) for a in argv])


def content(folder: Path) -> dict[str, dict[str, bytes]]:
    """Members by key and extension, of all tars in order."""
    found: dict[str, dict[str, bytes]] = {}
    for path in open_source(folder).shards:
        index = open_source(path).index(0)
        data = path.read_bytes()
        for row in range(len(index)):
            found[index.key(row)] = {e: data[o : o + n] for e, (o, n) in index.members(row).items()}
    return found


def told(sample: dict[str, bytes]) -> dict:
    return json.loads(sample["json"])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three samples in two tars, of which 7 has a JSON of its own."""
    folder = tmp_path / "old"
    folder.mkdir()
    write_tar(
        folder / "0.tar",
        {"a/6": {"jpg": picture(6), "txt": WORDS.encode()}, "a/7": {"jpg": picture(7), "json": b'{"image_id": 8}'}},
    )
    write_tar(folder / "1.tar", {"9": {"png": picture(9, "PNG"), "txt": b"second\nfirst one, longer", "cls": b"2"}})
    (folder / "classnames.txt").write_text("bus\ncar\ntree\n")
    return folder


def coco(path: Path) -> Path:
    images = [{"id": i, "file_name": f"{name}.jpg", "width": 20, "height": 10} for i, name in ((1, 6), (8, 70), (3, 9))]
    boxes = [
        {"id": 1, "image_id": 1, "bbox": [2, 1, 4, 5], "category_id": 4},
        {"id": 2, "image_id": 8, "bbox": [0, 0, 30, 5], "category_id": 5},
        {"id": 3, "image_id": 8, "bbox": [0, 0, 0, 5], "category_id": 5},
        {"id": 4, "image_id": 1, "bbox": [0, 0, 1, 1], "category_id": 5, "iscrowd": 1},
    ]
    names = [{"id": 4, "name": "bus"}, {"id": 5, "name": "traffic light"}]
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": names}))
    return path


# ----------------------------------------------------------------------------------------------------
# what is added and what is kept


def test_objects_of_coco_by_image_id_and_by_name(shards, tmp_path, capsys):
    before = {path: path.read_bytes() for path in shards.glob("*.tar")}
    out = tmp_path / "new"
    assert run("enrich", shards, "--out", out, "--coco", coco(tmp_path / "instances_x.json")) == 0
    printed = capsys.readouterr().out
    assert "3 samples, 2 with objects, 0 with summaries, 0 not matched" in printed
    assert "1 annotations left out, such as annotation 3: box without area" in printed
    old, new = content(shards), content(out)
    assert list(new) == list(old) == ["a/6", "a/7", "9"]
    assert read_objects(new["a/6"]["json"]).objects == [SceneObject((0.1, 0.1, 0.3, 0.6), "bus")]
    assert read_objects(new["a/7"]["json"]).objects == [SceneObject((0, 0, 1, 0.5), "traffic light")]
    assert told(new["9"])["objects"] == []
    assert told(new["a/7"]) | {"objects": 0} == {"image_id": 8, "objects": 0, "detector": "instances_x.json"}
    assert told(new["a/6"])["key"] == "a/6"
    for key, members in old.items():
        assert {name: data for name, data in new[key].items() if name != "json"} == {
            name: data for name, data in members.items() if name != "json"
        }
    assert {path: path.read_bytes() for path in shards.glob("*.tar")} == before
    assert open_source(out).lengths == open_source(shards).lengths
    assert (out / "classnames.txt").read_text() == (shards / "classnames.txt").read_text()
    assert run("verify", out, "--decode") == 0


@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [
        ("first-sentence", "A red bus.", "second\nfirst one, longer"),
        ("first-20-words", " ".join(WORDS.split()[:20]), "second\nfirst one, longer"),
        ("shortest-caption", WORDS, "second"),
    ],
)
def test_summaries_by_rule(shards, tmp_path, rule, first, second, capsys):
    assert run("enrich", shards, "--out", tmp_path / "new", "--summary", rule) == 0
    assert "3 samples, 0 with objects, 2 with summaries\n" in capsys.readouterr().out
    new = content(tmp_path / "new")
    assert new["a/6"]["summary.txt"].decode() == first
    assert new["9"]["summary.txt"].decode() == second
    assert told(new["9"]) == {"key": "9", "summary_model": rule}
    assert "summary.txt" not in new["a/7"]
    assert new["a/7"]["json"] == b'{"image_id": 8}'


def test_what_is_there_is_kept_unless_replaced(shards, tmp_path, capsys):
    instances, once, twice, third = coco(tmp_path / "i.json"), tmp_path / "1", tmp_path / "2", tmp_path / "3"
    assert run("enrich", shards, "--out", once, "--coco", instances, "--summary", "first-sentence") == 0
    other = json.loads(instances.read_text())
    other["categories"][0]["name"] = "lorry"
    instances.write_text(json.dumps(other))
    assert run("enrich", once, "--out", twice, "--coco", instances, "--summary", "shortest-caption") == 0
    assert content(twice) == content(once)
    assert run("enrich", once, "--out", third, "--coco", instances, "--summary", "shortest-caption", "--replace") == 0
    new = content(third)
    assert told(new["a/6"])["objects"][0]["label"] == "lorry"
    assert new["a/6"]["summary.txt"].decode() == WORDS
    assert told(new["a/6"])["summary_model"] == "shortest-caption"


def test_damaged_samples_are_passed_on_as_they_are(tmp_path, capsys):
    (tmp_path / "old").mkdir()
    samples = {
        "6": {"jpg": picture(6), "txt": b"fine", "json": b'{"score": NaN}'},
        "7": {"jpg": picture(7), "txt": b"words", "json": b"{"},
        "9": {"jpg": b"", "txt": b"caf\xe9"},
        "11": {"jpg": picture(1), "json": b"[1]"},
    }
    write_tar(tmp_path / "old" / "0.tar", samples)
    out = tmp_path / "new"
    instances = coco(tmp_path / "i.json")
    assert run("enrich", tmp_path / "old", "--out", out, "--coco", instances, "--summary", "first-sentence") == 0
    printed = capsys.readouterr().out
    assert "4 samples, 1 with objects, 1 with summaries, 0 not matched" in printed
    assert "3 damaged, passed on as they are, such as 7: .json: not JSON" in printed
    noted = [json.loads(line) for line in (out / "damaged.jsonl").read_text().splitlines()]
    assert [note["key"] for note in noted] == ["7", "9", "11"]
    assert noted[1]["reason"] == ".txt is not UTF-8 (byte 3)"
    assert noted[0]["shard"].endswith("old/0.tar")
    new = content(out)
    assert new["7"] == samples["7"]
    assert new["11"] == samples["11"]
    assert np.isnan(told(new["6"])["score"])
    assert "objects" in told(new["9"])


def test_a_tar_cut_short_gives_what_can_be_read(shards, tmp_path, capsys):
    whole = (shards / "0.tar").read_bytes()
    (shards / "0.tar").write_bytes(whole[:5000])
    assert run("enrich", shards, "--out", tmp_path / "new", "--summary", "first-sentence") == 0
    printed = capsys.readouterr().out
    assert "2 samples, 0 with objects, 2 with summaries" in printed
    assert "2 places of damage in the tars, such as" in printed
    assert "cut short" in (tmp_path / "new" / "damaged.jsonl").read_text()
    assert list(content(tmp_path / "new")) == ["a/6", "9"]


def test_tars_of_others_with_keys_that_come_again(tmp_path):
    (tmp_path / "old").mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / "old" / f"part-{shard}.tar")) as tar:
            for i in range(3):
                tar.write({"__key__": f"{i:05d}", "jpg": picture(10 * shard + i), "txt": f"caption {shard} {i}"})
    assert (
        run("enrich", tmp_path / "old" / "part-{0..1}.tar", "--out", tmp_path / "new", "--summary", "first-sentence")
        == 0
    )
    source = open_source(tmp_path / "new")
    assert source.lengths == [3, 3]
    assert all(not source.index(shard).problems for shard in range(2))
    for shard, path in enumerate(source.shards):
        assert [s["summary.txt"].decode() for s in content(path).values()] == [f"caption {shard} {i}" for i in range(3)]


def test_nothing_half_written_is_left(shards, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(enriching, "_summarize", interrupted)
    assert run("enrich", shards, "--out", tmp_path / "new", "--summary", "first-sentence") == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "say what the shards shall get"),
        (["--detector", MODEL], "--detector MODEL and --detector-weights FILE go together"),
        (["--summary", "first-sentence", "--store-features"], "--store-features are a detector's"),
        (["--summary", "first-sentence", "--score", "2"], "--score between 0 and 1"),
        (["--coco", "none.json"], "none.json cannot be read"),
        (["--open-images", "."], "holds no table with the columns ImageID, LabelName"),
        (
            ["--detector", "fasterrcn", "--detector-weights", "x.pth"],
            "no detection model 'fasterrcn'; there are faster",
        ),
        (["--detector", MODEL, "--detector-weights", "x.pth"], "x.pth: no such weight file"),
    ],
)
def test_what_cannot_be_done_is_said(shards, tmp_path, monkeypatch, argv, message, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("enrich", shards, "--out", "new", *argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_old_folder_is_no_place_for_new_shards(shards, capsys):
    assert run("enrich", shards, "--out", shards, "--summary", "first-sentence") == 2
    assert "is not empty" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# Open Images


def open_images(folder: Path) -> Path:
    folder.mkdir()
    (folder / "train-annotations-bbox.csv").write_text(
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
        "6,xclick,/m/t,0.7,0.1,0.5,0.2,0.9,0,0,0,0,0\n"
        "6,xclick,/m/t,1,0.5,0.9,0.2,0.9,0,0,0,0,0\n"
        "6,xclick,/m/c,1,0,1,0,1,0,0,1,0,0\n"
        "6,xclick,/m/unknown,1,0,1,0,1,0,0,0,0,0\n"
        "6,xclick,/m/c,1,0.5,0.5,0,1,0,0,0,0,0\n"
        "6,xclick,/m/c,1,left,0.5,0,1,0,0,0,0,0\n"
        "6,xclick,/m/c,nan,0,0.5,0,1,0,0,0,0,0\n"
        "9,activemil,/m/c,1,0.25,0.75,0,1,-1,-1,-1,-1,-1\n"
    )
    (folder / "oidv6-class-descriptions.csv").write_text('LabelName,DisplayName\n/m/t,Table\n/m/c,"Cat, domestic"\n')
    (folder / "oidv6-attributes-description.csv").write_text("/m/w,(made of)Wood\n/m/r,Round\n/m/n,(made of)\n")
    (folder / "oidv6-train-annotations-vrd.csv").write_text(
        "ImageID,LabelName1,LabelName2,XMin1,XMax1,YMin1,YMax1,XMin2,XMax2,YMin2,YMax2,RelationshipLabel\n"
        "6,/m/t,/m/w,0.5004,0.9,0.2,0.9,0.5004,0.9,0.2,0.9,is\n"
        "6,/m/t,/m/r,0.5,0.9,0.2,0.9,0.5,0.9,0.2,0.9,is\n"
        "6,/m/t,/m/w,0.5,0.9,0.2,0.9,0.5,0.9,0.2,0.9,is\n"
        "6,/m/t,/m/r,0.1,0.3,0.2,0.9,0.1,0.3,0.2,0.9,is\n"
        "6,/m/t,/m/n,0.5,0.9,0.2,0.9,0.5,0.9,0.2,0.9,is\n"
        "6,/m/t,/m/c,0.5,0.9,0.2,0.9,0,1,0,1,on\n"
        "404,/m/t,/m/r,0.5,0.9,0.2,0.9,0.5,0.9,0.2,0.9,is\n"
    )
    (folder / "train-annotations-human-imagelabels.csv").write_text("ImageID,Source,LabelName,Confidence\n6,v,/m/t,1\n")
    return folder


def test_objects_of_open_images_with_attributes(shards, tmp_path, capsys):
    assert run("enrich", shards, "--out", tmp_path / "new", "--open-images", open_images(tmp_path / "csv")) == 0
    printed = capsys.readouterr().out
    assert "3 samples, 2 with objects, 0 with summaries, 1 not matched" in printed
    assert "5 annotations left out, such as train-annotations-bbox.csv:5: column or name of a class missing" in printed
    new = content(tmp_path / "new")
    assert read_objects(new["a/6"]["json"]).objects == [
        SceneObject((0.5, 0.2, 0.9, 0.9), "Table", ("Wood", "Round"), 1.0),
        SceneObject((0.1, 0.2, 0.5, 0.9), "Table", (), 0.7),
    ]
    assert read_objects(new["9"]["json"]).objects == [SceneObject((0.25, 0, 0.75, 1), "Cat, domestic")]
    assert told(new["9"])["detector"] == "Open Images"
    assert new["a/7"]["json"] == b'{"image_id": 8}'


def test_open_images_without_names_is_refused(shards, tmp_path, capsys):
    folder = open_images(tmp_path / "csv")
    for path in folder.glob("*description*"):
        path.unlink()
    assert run("enrich", shards, "--out", tmp_path / "new", "--open-images", folder) == 2
    assert "holds no class descriptions" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# a detector


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> tuple[torch.nn.Module, Path, Path]:
    """A detector with random weights that likes its class 2, in a file, and its labels."""
    torch.manual_seed(0)
    model = get_model(MODEL, weights=None, weights_backbone=None, num_classes=4)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[2] += 4
    folder = tmp_path_factory.mktemp("detector")
    torch.save(model.state_dict(), folder / "model.pth")
    (folder / "labels.txt").write_text("cat\ntraffic  light\ntree\n")
    return model.eval(), folder / "model.pth", folder / "labels.txt"


def test_what_a_detector_finds_and_sees(shards, tmp_path, detector, capsys):
    model, weights, labels = detector
    strip = {"png": strip_of(1500)}
    damaged = {"bad": {"jpg": picture(1)[:100], "txt": b"x"}, "strip": strip, "words": {"txt": b"only"}}
    write_tar(shards / "2.tar", damaged)
    arguments = ("--detector", MODEL, "--detector-weights", weights, "--labels", labels)
    out = tmp_path / "new"
    assert run("enrich", shards, "--out", out, *arguments, "--store-features", "--score", 0.4, "--most", 4) == 0
    printed = capsys.readouterr().out
    assert "6 samples, 3 with objects, 0 with summaries, 0 not matched" in printed
    assert "3 damaged, passed on as they are, such as bad: unreadable image" in printed
    old, new = content(shards), content(out)
    assert [new[key] for key in damaged] == [old[key] for key in damaged] == list(damaged.values())
    for key in ("a/6", "a/7", "9"):
        pixels = webdataset.autodecode.imagehandler("torchrgb8")(
            "jpg" if "jpg" in new[key] else "png", new[key].get("jpg") or new[key]["png"]
        )
        expected = expected_of(model, pixels.float() / 255)
        objects, wrong = read_objects(new[key]["json"])
        assert wrong == []
        assert 0 < len(objects) <= 4
        assert {o.label for o in objects} == {"traffic light"}
        assert all(o.score >= 0.4 for o in objects)
        assert told(new[key])["detector"] == f"{MODEL} model.pth score 0.4"
        rows = read_rows(new[key]["roi.npy"], 1024 + 4)
        assert rows[:, 1024:] == pytest.approx(np.array([o.box for o in objects]), abs=1e-3)
        assert len(rows) == len(objects)
        boxes, vectors = expected
        assert rows[:, 1024:] == pytest.approx(boxes[: len(rows)], abs=0.01)
        assert rows[:, :1024] == pytest.approx(vectors[: len(rows)], abs=0.02)
        assert rows[:, :1024].std() > 0


def strip_of(width: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, 2)).save(out, "PNG")
    return out.getvalue()


@torch.no_grad()
def expected_of(model, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in shares of the image, best first, and the box head's features of each: the model's parts one by one."""
    height, width = image.shape[1:]
    found = model([image])[0]["boxes"]
    resized, _ = model.transform([image])
    (h, w) = resized.image_sizes[0]
    boxes = found * torch.tensor([w / width, h / height] * 2)
    pooled = model.roi_heads.box_roi_pool(model.backbone(resized.tensors), [boxes], resized.image_sizes)
    return (found / torch.tensor([width, height] * 2)).numpy(), model.roi_heads.box_head(pooled).numpy()


def test_weights_of_another_model_are_refused(shards, tmp_path, detector, capsys):
    _, weights, _ = detector
    assert run("enrich", shards, "--out", tmp_path / "new", "--detector", MODEL, "--detector-weights", weights) == 2
    assert "model.pth is not for" in (message := capsys.readouterr().err)
    assert "of 90 classes" in message
    wrong = ("--detector", "ssdlite320_mobilenet_v3_large", "--detector-weights", weights, "--store-features")
    assert run("enrich", shards, "--out", tmp_path / "new", *wrong) == 2
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------------------------------
# real photographs


@pytest.mark.real
def test_photographs_get_the_objects_that_packing_coco_gives(real_data, tmp_path, capsys):
    data = real_data / "coco-mini"
    assert run("pack", data / "val2017", "--format", "folder", "--flat", "--out", tmp_path / "plain") == 0
    instances = data / "annotations" / "instances_val2017.json"
    assert run("enrich", tmp_path / "plain", "--out", tmp_path / "rich", "--coco", instances) == 0
    assert run("pack", data, "--subdir", "val2017", "--out", tmp_path / "packed") == 0
    rich, packed = content(tmp_path / "rich"), content(tmp_path / "packed")
    assert rich.keys() >= packed.keys()
    for key, sample in packed.items():
        assert told(rich[key])["objects"] == told(sample)["objects"]
        assert rich[key]["jpg"] == sample["jpg"]
    assert sum(len(told(sample)["objects"]) for sample in packed.values()) > 500
