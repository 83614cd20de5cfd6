import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from pretrain.errors import UserError
from pretrain.shards.digits import CAPTIONS, LABELLED, NAMES, PLACES, handwriting, scene, write_digits
from pretrain.shards.objects import read_objects
from pretrain.shards.source import open_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "data"
    write_digits(out, train=40, test=20)
    return out


def samples(split):
    """Members by key and extension of every tar of a split."""
    found = {}
    for path in sorted(split.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return found


def digest(split):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(split.glob("*.tar"))]


def test_no_handwritten_digit_is_in_both_splits():
    train, test = (handwriting(split).images.reshape(-1, 64) for split in ("train", "test"))
    assert len(train) + len(test) == 1797
    assert len(test) == 360
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in test}
    assert set(handwriting("test").labels) == set(range(10))


def test_every_sample_is_whole(folder):
    for split, count in (("train", 40), ("test", 20)):
        read = samples(folder / split)
        assert len(read) == open_source(str(folder / split)).samples == count
        for parts in read.values():
            assert set(parts) == {"png", "txt", "cls", "json"}
            told = json.loads(parts["json"])
            assert Image.open(io.BytesIO(parts["png"])).size == (told["width"], told["height"])
            assert len(parts["txt"].decode().splitlines()) == CAPTIONS


def test_captions_tell_what_stands_where(folder):
    cells = int(len(PLACES) ** 0.5)
    for parts in samples(folder / "train").values():
        for found in read_objects(parts["json"]).objects:
            x1, y1, x2, y2 = found.box
            place = PLACES[int((y1 + y2) / 2 * cells) * cells + int((x1 + x2) / 2 * cells)]
            assert all(f"{found.label} {place}" in caption for caption in parts["txt"].decode().splitlines())


def test_the_label_is_the_digit_at_the_top_left(folder):
    for parts in samples(folder / "test").values():
        first = read_objects(parts["json"]).objects[LABELLED]
        assert max(first.box) <= 1 / int(len(PLACES) ** 0.5)
        assert first.label == NAMES[int(parts["cls"])]


def test_boxes_hold_the_digits_that_are_named():
    ink = handwriting("train")
    known = ink.images.reshape(len(ink.images), 64).astype(np.float32)
    known = (known - known.mean(1, keepdims=True)) / known.std(1, keepdims=True)
    right = []
    for number in range(30):
        drawn = scene(number, "train", ink, seed=0, size=96)
        picture = Image.open(io.BytesIO(drawn.png)).convert("L")
        for name, (x, y, width, height) in zip(drawn.names, drawn.boxes):
            assert min(x, y) >= 0
            assert max(x + width, y + height) <= 96
            seen = np.asarray(picture.crop((x, y, x + width, y + height)).resize((8, 8), Image.Resampling.BOX))
            right.append(NAMES[ink.labels[(known @ seen.ravel().astype(np.float32)).argmax()]] == name)
    assert np.mean(right) > 0.95


def test_scenes_and_captions_vary(folder):
    read = samples(folder / "train")
    assert len({parts["png"] for parts in read.values()}) == 40
    assert len({parts["cls"] for parts in read.values()}) >= 8
    assert len({len(read_objects(parts["json"]).objects) for parts in read.values()}) >= 2
    captions = [parts["txt"].decode().splitlines() for parts in read.values()]
    assert np.mean([len(set(lines)) for lines in captions]) > 3


def test_the_same_arguments_give_the_same_bytes(folder, tmp_path):
    write_digits(tmp_path / "again", train=40, test=20)
    write_digits(tmp_path / "other", train=40, test=20, seed=1)
    for split in ("train", "test"):
        assert digest(tmp_path / "again" / split) == digest(folder / split)
        assert digest(tmp_path / "other" / split) != digest(folder / split)


def test_class_names_and_templates_lie_where_readers_look(folder):
    for place in (folder, folder / "train", folder / "test"):
        assert tuple((place / "classnames.txt").read_text().split()) == NAMES
    templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert templates
    assert all("{c}" in line and PLACES[LABELLED] in line for line in templates)


def test_what_is_there_is_not_overwritten(folder, tmp_path):
    before = digest(folder / "test")
    with pytest.raises(UserError, match="is there already"):
        write_digits(folder, train=1, test=1)
    assert digest(folder / "test") == before
    with pytest.raises(UserError, match="at least"):
        write_digits(tmp_path / "none", train=0, test=1)
