"""What a sample's json says of its objects, and what a detector stored of them."""

from __future__ import annotations

import io
import json
from contextlib import suppress

import numpy as np
import pytest

from pretrain.shards.objects import MAX_BYTES, SceneObject, box_of_pixels, read_objects, tags
from pretrain.shards.roi import read_rows, rows_bytes

PILLOW = {"box": [0.1, 0.2, 0.5, 0.9], "label": "pillow", "attrs": ["square", "pink"], "score": 0.4}
COUCH = {"box": [0, 0, 1, 1], "label": "couch", "score": 0.9}
TABLE = {"box": [0.3, 0.3, 0.4, 0.4], "label": " round \n table ", "attrs": []}


def member(*objects: object) -> bytes:
    return json.dumps({"key": "a", "objects": objects}).encode()


def test_objects_come_best_first_and_say_what_they_are():
    found, wrong = read_objects(member(PILLOW, COUCH, TABLE))
    assert wrong == []
    assert found == [
        SceneObject((0.3, 0.3, 0.4, 0.4), "round table"),  # without a score: certain
        SceneObject((0, 0, 1, 1), "couch", (), 0.9),
        SceneObject((0.1, 0.2, 0.5, 0.9), "pillow", ("square", "pink"), 0.4),
    ]
    assert read_objects(member(*(o.record() for o in found))).objects == found


def test_objects_of_one_score_keep_their_order():
    boxed = [{"box": [0, 0, 1, 1], "label": str(i), "score": i // 3} for i in range(9)]
    assert [o.label for o in read_objects(member(*boxed)).objects] == list("678345012")


@pytest.mark.parametrize("data", [b"{}", b'{"objects": []}', b'{"objects": [], "cls": 3}', b'{"caption": "x"}'])
def test_a_json_of_other_things_lists_no_objects(data):
    assert read_objects(data) == ([], [])


def test_tags_name_the_best_ten_each_phrase_once():
    assert tags(read_objects(member(PILLOW, COUCH, PILLOW)).objects) == "couch, square pink pillow"
    assert tags([]) == ""
    many = [SceneObject((0, 0, 1, 1), f"thing {i}") for i in range(12)]
    assert tags(many) == ", ".join(f"thing {i}" for i in range(10))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"box": [0.5, 0.2, 0.5, 0.9]}, "has no area"),
        ({"box": [0.6, 0.2, 0.5, 0.9]}, "has no area"),
        ({"box": [0.1, 0.2, float("nan"), 0.9]}, "corner is no number but nan"),
        ({"box": [0.1, 0.2, float("inf"), 0.9]}, "corner is no number but inf"),
        ({"box": [0.1, 0.2, 1.1, 0.9]}, "reaches outside of 0 to 1"),
        ({"box": [10, 20, 300, 400]}, "reaches outside of 0 to 1"),
        ({"box": [0, 0, 10**400, 1]}, "too large"),
        ({"box": [0, 0, True, 1]}, "corner is no number but True"),
        ({"box": [0, 0, 1]}, "box is not"),
        ({"box": {"x": 1}}, "box is not"),
        ({"box": None}, "box is not"),
        ({"label": 3}, "label is no word but 3"),
        ({"label": "  "}, "label is no word"),
        ({"label": "half \ud800 a pair"}, "label is no word but"),
        ({"attrs": ["\udfff"]}, "attribute is no word but"),
        ({"label": "x" * 501}, "513 characters, more than 500"),
        ({"attrs": "pink"}, "attrs is no list"),
        ({"attrs": [1]}, "attribute is no word but 1"),
        ({"score": "high"}, "score is no number but 'high'"),
    ],
)
def test_a_wrong_object_costs_no_other(change, reason):
    found, wrong = read_objects(member(COUCH, PILLOW | change, TABLE))
    assert [o.label for o in found] == ["round table", "couch"]
    assert len(wrong) == 1
    assert wrong[0].startswith("object 1: ")
    assert reason in wrong[0]


def test_corners_off_by_rounding_are_brought_to_the_edge():
    assert read_objects(member(COUCH | {"box": [-1e-4, 0, 1.0004, 1]})).objects[0].box == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"caf\xe9", "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"objects": {"a": 1}}', "objects is no list"),
        (b'{"objects": null}', "objects is no list"),
        (b'{"objects": [' + b"0," * 10_000 + b"0]}", "10,001 objects, more than 10,000"),
        (b'{"objects":' + b"[" * 200_000, "nested too deeply"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"x": "' + b"a" * MAX_BYTES + b'"}', "more than"),
    ],
)
def test_what_is_no_json_of_objects_is_refused(data, reason):
    with pytest.raises(ValueError, match=reason):
        read_objects(data)


def test_no_json_makes_it_raise_anything_else():
    rng = np.random.default_rng(0)
    leaves = [
        None,
        True,
        3,
        -0.5,
        1e308,
        10**400,
        float("nan"),
        "",
        "word",
        "\ud800",
        [],
        {},
        [0, 0, 1, 1],
        [0.1, 0.2, 0.3, 0.4],
    ]
    names = ["box", "label", "attrs", "score", "other"]
    good = 0
    for _ in range(6000):
        objects = [{names[k]: leaves[v] for k, v in zip(rng.integers(0, 5, 4), rng.integers(0, len(leaves), 4))}] * 2
        found, wrong = read_objects(json.dumps({"objects": objects}).encode())
        assert len(found) + len(wrong) == 2
        assert isinstance(tags(found), str)
        good += len(found)
    assert good > 10


def test_boxes_of_pixels_become_shares_cut_to_the_image():
    assert box_of_pixels([10, 20, 30, 40], (100, 80)) == (0.1, 0.25, 0.4, 0.75)
    assert box_of_pixels([-5, 60, 200, 40], (100, 80)) == (0, 0.75, 1, 1)
    for wrong in ([100, 0, 5, 5], [0, 0, 0, 5], [0, 0, float("nan"), 5], [0, 0, 5]):
        with pytest.raises(ValueError, match="box"):
            box_of_pixels(wrong, (100, 80))


# ----------------------------------------------------------------------------------------------------
# roi.npy


def saved(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def bomb(header: str) -> bytes:
    text = (header + " " * (118 - len(header) - 1) + "\n").encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def test_stored_rows_come_back_as_they_were():
    rows = np.random.default_rng(0).normal(size=(7, 12)).astype(np.float16)
    assert np.array_equal(read_rows(memoryview(rows_bytes(rows)), 12), rows)
    assert read_rows(rows_bytes(rows[:0]), 12).shape == (0, 12)
    assert np.array_equal(read_rows(rows_bytes(np.asfortranarray(rows)), 12), rows)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an array"),
        (b"PK\x03\x04 an npz", "not an array"),
        (saved(np.zeros((3, 8), np.float16)), r"\(3, 8\) float16, should be \(n, 12\)"),
        (saved(np.zeros((3, 12), np.float32)), "float32"),
        (saved(np.zeros((3, 12), ">f2")), ">f2"),
        (saved(np.zeros(12, np.float16)), r"\(12,\)"),
        (saved(np.zeros((12, 3), np.float16).T), "row after row"),
        (saved(np.array([[{"a": 1}]]), allow_pickle=True), "object"),
        (saved(np.zeros((3, 12), np.float16))[:-1], "71 bytes of numbers"),
        (saved(np.zeros((3, 12), np.float16)) + b"\0", "73 bytes of numbers"),
        (saved(np.full((3, 12), np.nan, np.float16)), "not finite"),
        (bomb("{'descr': '<f2', 'fortran_order': False, 'shape': (1000000000000, 12), }"), "0 bytes of numbers"),
        (bomb("{'descr': '<f2', 'fortran_order': False, 'shape': (-1, 12), }"), "0 bytes of numbers"),
        (bomb("(" * 117), "not an array"),
        (bomb("__import__('os')"), "not an array"),
    ],
)
def test_what_is_no_array_of_rows_is_refused(data, reason):
    with pytest.raises(ValueError, match=reason):
        read_rows(data, 12)


def test_one_row_is_one_however_its_header_says_so():
    header = "{'descr': '<f2', 'fortran_order': False, 'shape': (True, 12), }"
    assert read_rows(bomb(header) + bytes(24), 12).shape == (1, 12)


def test_no_bytes_make_it_raise_anything_else():
    whole, rng = bytearray(saved(np.ones((2, 12), np.float16))), np.random.default_rng(0)
    read = 0
    for _ in range(3000):
        data = whole.copy()
        for place in rng.integers(0, 130, rng.integers(1, 4)):
            data[place] = rng.integers(256)
        with suppress(ValueError):
            read += read_rows(bytes(data), 12).shape == (2, 12)
    assert 0 < read < 3000
