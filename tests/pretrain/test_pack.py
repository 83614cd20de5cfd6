"""Packing folders, tables, COCO and tars: what is kept, what is skipped and why, the same each time."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import random
import tarfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from pretrain import cli
from pretrain.__main__ import VERBS
from pretrain.shards import pack as packing
from pretrain.shards.entries import assign_keys, safe_key
from pretrain.shards.objects import SceneObject, read_objects
from pretrain.shards.source import open_source
from tests.pretrain.test_shard_index import header_at, overwrite, samples, write_tar


def image(value: int = 0, format: str = "JPEG", size: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((size, size)).convert("RGB").point(lambda v: (v + value) % 256).save(
        buffer, format
    )
    return buffer.getvalue()


def photos(folder: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(i))
    return folder


def run(verb: str, *arguments: object) -> int:
    return cli.call(f"pretrain {verb}", VERBS[verb], [str(a) for a in arguments])


def content(folder: Path) -> dict[str, dict[str, bytes]]:
    """Every sample of a packed folder: key -> extension -> bytes."""
    source, found = open_source(str(folder)), {}
    for shard, path in enumerate(source.shards):
        index, data = source.index(shard), path.read_bytes()
        for key, parts in zip(index.keys, index.block(0, len(index))):
            found[key] = {e: data[offset : offset + size] for e, (offset, size) in parts.items()}
    return found


def skipped(folder: Path) -> dict[str, list[str]]:
    """reason -> names."""
    reasons: dict[str, list[str]] = {}
    for line in (folder / "skipped.jsonl").read_text().splitlines():
        record = json.loads(line)
        reasons.setdefault(record["reason"], []).append(record["name"])
    return reasons


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


# ---------------------------------------------------------------------------------------------- folders


def test_a_folder_of_classes(tmp_path: Path) -> None:
    photos(tmp_path / "in", [f"{name}/{i}.jpg" for name in ("zebra", "ant") for i in range(3)])
    assert run("pack", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "classnames.txt").read_text() == "ant\nzebra\n"
    found = content(tmp_path / "out")
    assert {key: parts["cls"] for key, parts in found.items()} == {
        f"{name}-{i}": label for name, label in (("ant", b"0"), ("zebra", b"1")) for i in range(3)
    }
    assert found["zebra-1"]["jpg"] == (tmp_path / "in" / "zebra" / "1.jpg").read_bytes()


def test_a_class_is_a_line_whatever_its_folder_is_called(tmp_path: Path) -> None:
    photos(tmp_path / "in", [f"{name}/0.jpg" for name in ("a\nb", " ", "c")])
    assert run("pack", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "classnames.txt").read_text() == "_\na b\nc\n"


def test_a_flat_folder_and_flat_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos(tmp_path / "in", ["1.jpg", "2.jpg"])
    assert run("pack", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert set(content(tmp_path / "out")) == {"1", "2"}
    photos(tmp_path / "in", ["album/1.jpg"])
    assert run("pack", tmp_path / "in", "--out", tmp_path / "out2") == 2
    assert "--flat" in capsys.readouterr().err
    assert run("pack", tmp_path / "in", "--flat", "--out", tmp_path / "out2") == 0
    assert set(content(tmp_path / "out2")) == {"1", "2", "album-1"}
    assert not (tmp_path / "out2" / "classnames.txt").exists()


@pytest.mark.parametrize("packed", [False, True], ids=["tar", "tar.gz"])
def test_a_folder_inside_a_tar(tmp_path: Path, packed: bool, capsys: pytest.CaptureFixture[str]) -> None:
    members = [
        (f"set/{part}/{name}/{i}.jpg", image(i)) for part in ("train", "test") for name in ("b", "a") for i in range(2)
    ]
    path = write_tar(tmp_path / "set.tar", members)
    if packed:
        plain, path = path, tmp_path / "set.tar.gz"
        path.write_bytes(gzip.compress(plain.read_bytes()))
    assert run("pack", path, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "--subdir train" in error
    assert str(path) in error
    for subdir in ("train", "set/train"):
        out = tmp_path / subdir.replace("/", "_")
        assert run("pack", path, "--subdir", subdir, "--out", out) == 0
        assert {key: parts["cls"] for key, parts in content(out).items()} == {
            "a-0": b"0", "a-1": b"0", "b-0": b"1", "b-1": b"1",
        }  # fmt: skip
    assert run("pack", path, "--subdir", "val", "--out", tmp_path / "none") == 2
    assert "it has: test, train" in capsys.readouterr().err
    assert not list(tmp_path.glob(".unpacked*"))


def test_a_damaged_gzip_gives_what_it_still_holds(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "a.tar", [(f"c{i % 2}/{i}.jpg", os.urandom(3000)) for i in range(40)])
    data = bytearray(plain.read_bytes())
    for i in range(40):  # real images, incompressible padding behind them
        at = data.find(f"c{i % 2}/{i}.jpg".encode()) + 512
        data[at : at + len(image(i))] = image(i)
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(bytes(data))[:60_000])
    assert run("pack", packed, "--out", tmp_path / "out") == 0
    assert 10 < len(content(tmp_path / "out")) < 40
    assert "compressed tar damaged" in skipped(tmp_path / "out")


def test_bad_images_are_skipped_by_name_and_reason(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", ["good.jpg"])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_bytes(b"<html>")
    (folder / "cut.jpg").write_bytes(image(size=200)[:900])
    (folder / "cut.png").write_bytes(image(format="PNG", size=200)[:300])
    (folder / "png_called.jpg").write_bytes(image(format="PNG"))
    (folder / "notes.doc").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    bomb = bytearray(image(format="PNG"))
    bomb[16:24] = (9_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(bomb)
    assert run("pack", folder, "--out", tmp_path / "out") == 0
    assert {key: list(parts) for key, parts in content(tmp_path / "out").items()} == {
        "good": ["jpg"],
        "png_called": ["png"],
    }
    assert {reason: sorted(names) for reason, names in skipped(tmp_path / "out").items()} == {
        "zero bytes": ["empty.jpg"],
        "not an image": ["page.jpg"],
        "unreadable image": ["cut.jpg", "cut.png"],
        "not an image by its name": ["notes.doc"],
        "image bomb": ["bomb.png"],
    }


def test_a_pipe_is_skipped_and_not_waited_for(tmp_path: Path) -> None:
    photos(tmp_path / "in", ["a.jpg"])
    os.mkfifo(tmp_path / "in" / "b.jpg")
    assert run("pack", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert skipped(tmp_path / "out") == {"unreadable file": ["b.jpg"]}


def test_damage_behind_the_header_is_found_by_decoding(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", ["good.jpg"])
    noise = Image.frombytes("L", (64, 64), random.Random(0).randbytes(64 * 64))
    noise.save(folder / "bad.png")
    overwrite(folder / "bad.png", 2000, bytes(100))
    assert run("pack", folder, "--out", tmp_path / "header") == 0
    assert run("pack", folder, "--out", tmp_path / "decode", "--check", "decode") == 0
    assert set(content(tmp_path / "header")) == {"good", "bad"}
    assert set(content(tmp_path / "decode")) == {"good"}
    assert skipped(tmp_path / "decode") == {"unreadable image": ["bad.png"]}


# ---------------------------------------------------------------------------------------------- tables


def table(path: Path, rows: list[bytes], delimiter: bytes = b"\t") -> Path:
    path.write_bytes(b"\n".join(row.replace(b"\t", delimiter) for row in rows) + b"\n")
    return path


def test_captions_of_an_image_stand_together_one_a_line(tmp_path: Path) -> None:
    photos(tmp_path / "images", ["a.jpg", "b.jpg"])
    rows = [b"image\tcaption", b'a.jpg\tA "quoted" one', b"b.jpg\tB", "a.jpg\tünï".encode()]
    path = table(tmp_path / "c.tsv", rows)
    assert run("pack", path, "--images", tmp_path / "images", "--out", tmp_path / "out") == 0
    texts = {key: parts["txt"].decode() for key, parts in content(tmp_path / "out").items()}
    assert texts == {"a": 'A "quoted" one\nünï', "b": "B"}


def test_csv_quoting_and_line_breaks_inside_captions(tmp_path: Path) -> None:
    photos(tmp_path, ["a.jpg"])
    path = tmp_path / "c.csv"
    path.write_bytes(b'\xef\xbb\xbftitle,filepath\r\n"one, two\r\nthree \xe2\x80\xa8 four",a.jpg\r\n')
    assert run("pack", path, "--out", tmp_path / "out") == 0
    assert content(tmp_path / "out")["a"]["txt"].decode() == "one, two\\nthree \\n four"


@pytest.mark.parametrize(
    ("header", "columns"),
    [(b"when\tpic\twords", "pic,words"), (None, "1,2"), (b"file\tpic\tcaption", "1,2")],
)
def test_columns_by_name_and_number(tmp_path: Path, header: bytes | None, columns: str) -> None:
    photos(tmp_path, ["a.jpg"])
    rows = ([header] if header else []) + [b"x\ta.jpg\tA"]
    path = table(tmp_path / "c.tsv", rows)
    assert run("pack", path, "--columns", columns, "--out", tmp_path / "out") == 0
    assert content(tmp_path / "out")["a"]["txt"] == b"A"


def test_unknown_columns_and_missing_folders_say_what_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "images", ["a.jpg"])
    path = table(tmp_path / "c.tsv", [b"x\ty", b"a.jpg\tA"])
    assert run("pack", path, "--out", tmp_path / "out") == 2
    assert "--columns" in capsys.readouterr().err
    assert run("pack", path, "--columns", "x,z", "--out", tmp_path / "out") == 2
    assert "no column 'z'" in capsys.readouterr().err
    assert run("pack", path, "--columns", "x,y", "--out", tmp_path / "out") == 2
    assert "--images" in capsys.readouterr().err
    path.write_bytes("image\tcaption".encode("utf-16"))
    assert run("pack", path, "--out", tmp_path / "out") == 2
    assert "UTF-16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    photos(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    rows = [
        b"image\tcaption", b"a.jpg\tgood", b"a.jpg\tlatin \xe9", b"b.jpg\tonly \xff", b"c.jpg\t  ", b"alone",
        b"gone.jpg\tnot there",
    ]  # fmt: skip
    assert run("pack", table(tmp_path / "c.tsv", rows), "--out", tmp_path / "out") == 0
    assert content(tmp_path / "out").keys() == {"a"}
    assert content(tmp_path / "out")["a"]["txt"] == b"good"
    found = skipped(tmp_path / "out")
    assert found["caption not UTF-8"] == ["c.tsv:3 a.jpg", "c.tsv:4 b.jpg"]
    assert found["empty caption"] == ["c.tsv:5 c.jpg"]
    assert found["row without a caption"] == ["c.tsv:6"]
    assert found["image without a usable caption"] == ["b.jpg", "c.jpg"]
    assert found["missing image"] == ["gone.jpg"]


# ---------------------------------------------------------------------------------------------- COCO


def coco(folder: Path, box: list[float]) -> Path:
    photos(folder / "train", ["1.jpg", "2.jpg"])
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 16, "height": 16} for i in (1, 2)]
    notes = [{"id": 9, "image_id": 1, "caption": "one"}, {"id": 8, "image_id": 2, "caption": "two\nlines"}]
    boxes = [
        {"id": 5, "image_id": 1, "bbox": [0, 1, 2.5, 3], "category_id": 7, "iscrowd": 0},
        {"id": 6, "image_id": 1, "bbox": [0, 0, 9, 9], "category_id": 7, "iscrowd": 1},
        {"id": 7, "image_id": 2, "bbox": box, "category_id": 7},
    ]
    (folder / "annotations").mkdir()
    (folder / "annotations" / "captions_train.json").write_text(json.dumps({"images": images, "annotations": notes}))
    (folder / "annotations" / "instances_train.json").write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "cat"}]})
    )
    return folder


@pytest.mark.parametrize("box", [[0, 0, 0, 5], [0, 0, math.inf, 5], [math.nan, 0, 1, 1], [0, 0, 1]])
def test_coco_captions_and_boxes(tmp_path: Path, box: list[float]) -> None:
    folder = coco(tmp_path / "coco", box)
    for i, given in enumerate([folder, *sorted((folder / "annotations").iterdir())]):
        out = tmp_path / f"out{i}"
        assert run("pack", given, "--out", out) == 0
        found = content(out)
        assert found["2"]["txt"] == b"two\\nlines"
        assert json.loads(found["1"]["json"]) == {
            "image_id": 1, "width": 16, "height": 16,
            "objects": [{"box": [0, 0.0625, 0.15625, 0.25], "label": "cat", "attrs": [], "score": 1}],
        }  # fmt: skip
        assert json.loads(found["2"]["json"])["objects"] == []
        assert skipped(out) == {"box without area": ["annotation 7"]}


@pytest.mark.parametrize("wrong", ["{", "[]", "{}", '{"images": [{}], "annotations": [{}]}'])
def test_what_is_not_coco_is_refused_by_name(tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = coco(tmp_path / "coco", [0, 0, 1, 1])
    path = folder / "annotations" / "captions_train.json"
    path.write_text(wrong)
    assert run("pack", path, "--out", tmp_path / "out") == 2
    assert "captions_train.json" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- tars


def test_existing_tars_are_taken_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "wds"
    folder.mkdir()
    for i in range(3):
        write_tar(folder / f"{i}.tar", samples(10))
    overwrite(folder / "1.tar", header_at(folder / "1.tar", "00005.txt"), b"\xff")
    before = tars(folder)
    assert run("pack", folder) == 0
    output = capsys.readouterr().out
    assert "29 samples" in output
    assert "1.tar: 2 problem(s)" in output
    assert tars(folder) == before
    summary = json.loads((folder / "pack.json").read_text())
    assert [(s["name"], s["samples"], s["damaged"]) for s in summary["shards"]] == [
        ("0.tar", 10, 0), ("1.tar", 9, 2), ("2.tar", 10, 0),
    ]  # fmt: skip
    (folder / "2.tar").unlink()
    assert run("pack", folder) == 0  # a second time, after a change
    assert open_source(str(folder)).samples == 19


def test_samples_inside_a_compressed_tar_are_packed_anew_with_all_members(tmp_path: Path) -> None:
    members = [
        (f"d/{i}.{e}", data) for i in range(3) for e, data in (("jpg", image(i)), ("cls", b"4"), ("x.npy", b"n"))
    ]
    plain = write_tar(tmp_path / "a.tar", members)
    packed = tmp_path / "a.tgz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert run("pack", packed, "--out", tmp_path / "out") == 0
    assert content(tmp_path / "out")["d-1"] == {"jpg": image(1), "cls": b"4", "x.npy": b"n"}


# ---------------------------------------------------------------------------------------------- the shards


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", [f"c{i % 3}/{i}.jpg" for i in range(30)])
    for out in ("a", "b"):
        assert (
            run(
                "pack",
                folder,
                "--out",
                tmp_path / out,
                "--shard-size",
                7,
                "--threads",
                1 if out == "a" else 5,
            )
            == 0
        )
        os.utime(folder / "c0" / "0.jpg")
    first = tars(tmp_path / "a")
    assert len(first) == 5
    assert first == tars(tmp_path / "b")
    with tarfile.open(tmp_path / "a" / "0.tar") as tar:
        infos = tar.getmembers()
    assert [info.name.partition(".")[2] for info in infos] == ["cls", "jpg"] * 7
    assert {(info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) for info in infos} == {
        (0, 0, 0, "", "", 0o644)
    }
    assert (tmp_path / "a" / "pack.json").read_bytes() == (tmp_path / "b" / "pack.json").read_bytes()
    assert run("pack", folder, "--out", tmp_path / "c", "--shard-size", 7, "--shuffle-seed", 1) == 0
    assert tars(tmp_path / "c") != first
    assert content(tmp_path / "c") == content(tmp_path / "a")


def test_shuffled_by_default_sorted_on_request(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", [f"{name}/{i}.jpg" for name in "ab" for i in range(20)])
    assert run("pack", folder, "--out", tmp_path / "shuffled") == 0
    assert run("pack", folder, "--out", tmp_path / "sorted", "--sorted") == 0
    labels = [parts["cls"] for parts in content(tmp_path / "shuffled").values()]
    assert 5 < labels[:20].count(b"0") < 15
    assert list(content(tmp_path / "sorted")) == sorted(content(tmp_path / "sorted"))


def test_shards_are_cut_by_samples_and_by_bytes(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", [f"{i}.jpg" for i in range(10)])
    assert run("pack", folder, "--out", tmp_path / "n", "--shard-size", 4) == 0
    assert open_source(str(tmp_path / "n")).lengths == [4, 4, 2]
    assert (tmp_path / "n" / "nshards.txt").read_text() == "3\n"
    assert run("pack", folder, "--out", tmp_path / "b", "--shard-bytes", "4K") == 0
    assert sum(open_source(str(tmp_path / "b")).lengths) == 10
    assert len(open_source(str(tmp_path / "b")).lengths) > 3


def test_holdout_divides_by_image_and_stays_when_images_are_added(tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(40)]
    folder = photos(tmp_path / "in", names)
    assert run("pack", folder, "--out", tmp_path / "a", "--holdout", 10, "--shuffle-seed", 3) == 0
    train, test = content(tmp_path / "a" / "train"), content(tmp_path / "a" / "test")
    assert (len(train), len(test)) == (30, 10)
    assert train.keys() | test.keys() == {name[:-4] for name in names}
    photos(tmp_path / "in", ["new.jpg"])
    assert run("pack", folder, "--out", tmp_path / "b", "--holdout", 10) == 0
    assert len(content(tmp_path / "b" / "test").keys() & test.keys()) >= 9


def test_limit_takes_so_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photos(tmp_path / "in", [f"{i}.jpg" for i in range(20)])
    assert run("pack", folder, "--out", tmp_path / "a", "--limit", 7) == 0
    assert len(content(tmp_path / "a")) == 7
    assert run("pack", folder, "--out", tmp_path / "b", "--limit", 7, "--holdout", 7) == 2
    assert "leaves nothing" in capsys.readouterr().err


def test_a_folder_that_is_not_empty_is_never_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = photos(tmp_path / "in", ["a.jpg"]), tmp_path / "out"
    out.mkdir()
    assert run("pack", folder, "--out", out) == 0  # empty is fine
    before = tars(out)
    assert run("pack", folder, "--out", out) == 2
    assert "is not empty" in capsys.readouterr().err
    assert tars(out) == before
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine.txt").write_text("mine")
    assert run("pack", folder, "--out", tmp_path / "new") == 2
    assert (tmp_path / "new.partial" / "mine.txt").exists()


def test_an_interrupted_pack_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = photos(tmp_path / "in", [f"{i}.jpg" for i in range(9)]), tmp_path / "out"
    add, calls = packing.ShardWriter.add, []

    def interrupted(self, key, sample):
        calls.append(key)
        if len(calls) == 6:
            raise KeyboardInterrupt
        add(self, key, sample)

    with monkeypatch.context() as patch:
        patch.setattr(packing.ShardWriter, "add", interrupted)
        assert run("pack", folder, "--out", out, "--shard-size", 2) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    with monkeypatch.context() as patch:  # killed: nothing could be tidied
        calls.clear()
        patch.setattr(packing.ShardWriter, "add", interrupted)
        patch.setattr(packing.shutil, "rmtree", lambda *_, **__: None)
        run("pack", folder, "--out", out, "--shard-size", 2)
    assert not out.exists()
    assert (tmp_path / "out.partial" / "0.tar").exists()
    assert run("pack", folder, "--out", out) == 0
    assert len(content(out)) == 9
    assert not (tmp_path / "out.partial").exists()


def test_two_packs_into_one_folder_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photos(tmp_path / "in", ["a.jpg"])
    with packing.unfinished(tmp_path / "out"):
        assert run("pack", folder, "--out", tmp_path / "out") == 2
    assert "another pack" in capsys.readouterr().err


def test_nothing_to_pack_is_an_error_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    assert run("pack", tmp_path / "in", "--out", tmp_path / "out") == 2
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    assert run("pack", tmp_path / "in", "--out", tmp_path / "out") == 2
    assert "zero bytes: 1" in capsys.readouterr().err
    assert run("pack", tmp_path / "gone", "--out", tmp_path / "out") == 2
    assert run("pack", tmp_path / "in") == 2
    assert "--out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- keys


def test_keys_are_safe_and_all_different() -> None:
    names = [
        "a b.jpg",
        "a.b.jpg",
        "a/b.jpg",
        "a-b.jpg",
        "e\u0301.jpg",
        "é.jpg",
        "日本.png",
        "x.jpg",
        "x.png",
        "💥.jpg",
        ".jpg",
    ]
    keys = assign_keys(names + ["l" * 300 + ".jpg", "l" * 301 + ".jpg", "日" * 100 + ".jpg"])
    assert len(set(keys.values())) == len(keys)
    assert keys["日本.png"] == "日本"
    assert keys["a b.jpg"] == "a_b"
    assert keys["a-b.jpg"] == "a-b"
    assert keys["a/b.jpg"].startswith("a-b-")
    for key in keys.values():
        assert len(key.encode()) <= 80
        assert not set("./ \\") & set(key)
    assert assign_keys(reversed(names)) == assign_keys(names)
    assert safe_key("n01/IMG 1.JPEG") == "n01-IMG_1"


def test_original_names_are_kept_where_keys_differ(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", ["my photo.jpg", "plain.jpg"])
    assert run("pack", folder, "--out", tmp_path / "out") == 0
    (line,) = (tmp_path / "out" / "renamed.jsonl").read_text().splitlines()
    assert json.loads(line) == {"key": "my_photo", "name": "my photo.jpg"}


# ---------------------------------------------------------------------------------------------- verify


def test_verify_names_shard_key_and_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [("a.jpg", image()), ("a.txt", b"ok"), ("b.jpg", image(1))]
    path = write_tar(tmp_path / "0.tar", members)
    assert run("verify", path, "--decode") == 0
    assert "2 samples in 1 shards: all is well" in capsys.readouterr().out
    bad = [
        *members, ("c.jpg", b""), ("d.txt", b"no image"), ("e.jpg", b"<html>"),
        ("f.jpg", image()), ("f.txt", b"\xff"), ("f.cls", b"cat"), ("f.json", b"{"),
    ]  # fmt: skip
    write_tar(path, bad)
    assert run("verify", path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[1] for line in lines[:-1]] == ["c", "d"]
    assert run("verify", path, "--decode") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[1] for line in lines[:-1]] == ["c", "d", "e", "f", "f", "f"]
    assert all(line.startswith(str(path)) for line in lines[:-1])


def test_verify_goes_on_after_a_shard_that_is_none_and_sees_changed_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", samples(4, ("jpg",))[1:])
    assert run("pack", tmp_path) == 0
    (tmp_path / "0.tar").write_bytes(b"<html>" * 500)
    write_tar(tmp_path / "1.tar", samples(3, ("jpg",))[1:])
    assert run("verify", tmp_path, "--workers", 2) == 1
    output = capsys.readouterr().out
    assert "0.tar is not a tar" in output
    assert "2 samples where pack.json notes 3" in output
    assert "5 samples in 3 shards" in output


# ------------------------------------------------------------------------------------ real photographs


@pytest.mark.real
def test_flickr_captions_with_a_holdout(tmp_path: Path, real_data: Path) -> None:
    folder = real_data / "flickr1k"
    arguments = (folder / "captions.tsv", "--images", folder / "images", "--out", tmp_path / "out")
    assert run("pack", *arguments, "--limit", 60, "--holdout", 10, "--check", "decode") == 0
    train, test = content(tmp_path / "out" / "train"), content(tmp_path / "out" / "test")
    assert (len(train), len(test)) == (50, 10)
    for key, parts in test.items():
        assert len(parts["txt"].decode().split("\n")) == 5
        assert parts["jpg"] == (folder / "images" / f"{key}.jpg").read_bytes()
    assert run("verify", tmp_path / "out" / "train", "--decode") == 0


@pytest.mark.real
def test_coco_with_boxes(tmp_path: Path, real_data: Path) -> None:
    assert run("pack", real_data / "coco-mini", "--subdir", "val2017", "--out", tmp_path / "out") == 0
    found = content(tmp_path / "out")
    assert len(found) == 79
    described = [json.loads(parts["json"]) for parts in found.values()]
    assert sum(len(d["objects"]) for d in described) > 500
    for key, d in zip(found, described):
        assert d["image_id"] == int(key)
        objects = [SceneObject(tuple(o["box"]), o["label"]) for o in d["objects"]]
        assert read_objects(found[key]["json"]) == (objects, [])
        assert Image.open(io.BytesIO(found[key]["jpg"])).size == (d["width"], d["height"])


@pytest.mark.real
def test_cifar_inside_a_compressed_tar(tmp_path: Path, real_data: Path) -> None:
    out = tmp_path / "out"
    path = real_data / "cifar10-24k.tar.gz"
    assert run("pack", path, "--subdir", "test", "--limit", 300, "--out", out) == 0
    names = (out / "classnames.txt").read_text().split()
    assert len(names) == 10
    with tarfile.open(path) as tar:  # in one pass: a compressed tar cannot be read backwards
        infos = (info for info in tar if info.name.startswith("cifar10/test/"))
        streams = ((info.name, tar.extractfile(info)) for info in infos)
        originals = {name: stream.read() for name, stream in streams if stream}
    found = content(out)
    assert len(found) == 300
    for key, parts in found.items():
        name = names[int(parts["cls"])]
        assert originals[f"cifar10/test/{name}/{key.removeprefix(name + '-')}.jpg"] == parts["jpg"]
