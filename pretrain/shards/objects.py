"""The objects of a sample: what stands where in its image, as the member `json` lists them.

`{"objects": [{"box": [x1, y1, x2, y2], "label": "pillow", "attrs": ["pink"], "score": 0.9}, …]}`: corners as shares
of the whole image's width and height, as it is decoded (an EXIF orientation is ignored). `attrs` and `score` may be
missing; what people annotated has the score 1.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

MAX_BYTES = 4 << 20  # of JSON
MAX_OBJECTS = 10_000
MAX_PHRASE = 500  # characters of a label and its attributes
ROUNDING = 1e-3  # how far outside the image a box may reach: the third decimal, a pixel of a thousand
DECIMALS = 6

Box = tuple[float, float, float, float]


class SceneObject(NamedTuple):
    """One object: `box` is (x1, y1, x2, y2) in shares of the image, 0 <= x1 < x2 <= 1 and so for y."""

    box: Box
    label: str
    attrs: tuple[str, ...] = ()
    score: float = 1.0

    @property
    def phrase(self) -> str:
        """`attribute attribute label`."""
        return " ".join([*self.attrs, self.label])

    def record(self) -> dict[str, Any]:
        """What the JSON says of it."""
        return {"box": list(self.box), "label": self.label, "attrs": list(self.attrs), "score": self.score}


class Found(NamedTuple):
    """The objects that could be read, the best scored first, and of each other one what is wrong with it."""

    objects: list[SceneObject]
    wrong: list[str]


def read_objects(data: bytes | memoryview) -> Found:
    """The objects of a `json` member; none where it lists none. ValueError where it cannot be read at all."""
    listed = read_json(data).get("objects", [])
    if not isinstance(listed, list):
        raise ValueError(f"objects is no list but {reprlib.repr(listed)}")
    if len(listed) > MAX_OBJECTS:
        raise ValueError(f"{len(listed):,} objects, more than {MAX_OBJECTS:,}")
    objects, wrong = [], []
    for number, given in enumerate(listed):
        try:
            objects.append(_object(given))
        except (ValueError, OverflowError) as error:  # an integer of 400 digits is no float
            wrong.append(f"object {number}: {error}")
    return Found(best_first(objects), wrong)


def read_json(data: bytes | memoryview) -> dict[str, Any]:
    """A `json` member; ValueError where it is too large, no JSON, or no object of names and values."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data):,} bytes of JSON, more than {MAX_BYTES:,}")
    try:
        told = json.loads(bytes(data))
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(told, dict):
        raise ValueError(f"not a JSON object but {reprlib.repr(told)}")
    return told


def best_first(objects: Sequence[SceneObject]) -> list[SceneObject]:
    """By falling score; objects of one score keep their order."""
    return sorted(objects, key=lambda o: -o.score)


def tags(objects: Sequence[SceneObject], most: int = 10) -> str:
    """The first `most` objects in words, each phrase once: `pink pillow, green couch`; empty without objects."""
    return ", ".join(dict.fromkeys(o.phrase for o in objects[:most]))


def box_of_pixels(box: Sequence[float], image: tuple[int, int]) -> Box:
    """(x, y, width, height) in pixels, cut to the image of (width, height) pixels.

    Raises ValueError where nothing is left of it.
    """
    if len(box) != 4 or not all(map(math.isfinite, box)) or min(image) < 1:
        raise ValueError(f"box {reprlib.repr(box)} in an image of {image[0]} x {image[1]} pixels")
    x, y, width, height = box
    corners = x / image[0], y / image[1], (x + width) / image[0], (y + height) / image[1]
    return _with_area(tuple(round(min(max(c, 0.0), 1.0), DECIMALS) for c in corners))


def box_of_shares(given: Any) -> Box:
    """[x1, y1, x2, y2] in shares of the image; ValueError where they are no such box."""
    if not isinstance(given, list) or len(given) != 4:
        raise ValueError(f"box is not [x1, y1, x2, y2] but {reprlib.repr(given)}")
    corners = [_number("box corner", corner) for corner in given]
    if min(corners) < -ROUNDING or max(corners) > 1 + ROUNDING:
        raise ValueError(f"box {reprlib.repr(given)} is not in shares of the image: it reaches outside of 0 to 1")
    return _with_area(tuple(min(max(corner, 0.0), 1.0) for corner in corners))


def _object(given: Any) -> SceneObject:
    if not isinstance(given, dict):
        raise ValueError(f"no object of box and label but {reprlib.repr(given)}")
    attrs = given.get("attrs", [])
    if not isinstance(attrs, list):
        raise ValueError(f"attrs is no list but {reprlib.repr(attrs)}")
    named = SceneObject(
        box_of_shares(given.get("box")),
        _word("label", given.get("label")),
        tuple(_word("attribute", attribute) for attribute in attrs),
        _number("score", given.get("score", 1.0)),
    )
    if len(named.phrase) > MAX_PHRASE:
        raise ValueError(f"label and attributes of {len(named.phrase)} characters, more than {MAX_PHRASE}")
    return named


def _with_area(box: tuple[float, ...]) -> Box:
    x1, y1, x2, y2 = box
    if not (x1 < x2 and y1 < y2):
        raise ValueError(f"box {list(box)} has no area")
    return x1, y1, x2, y2


def _number(what: str, given: Any) -> float:
    if type(given) not in (int, float) or not math.isfinite(given):
        raise ValueError(f"{what} is no number but {reprlib.repr(given)}")
    return float(given)


def _word(what: str, given: Any) -> str:
    """White space collapsed; half a surrogate pair, which JSON can hold and no file, makes it no word."""
    if not isinstance(given, str) or not given.strip() or any("\ud800" <= letter <= "\udfff" for letter in given):
        raise ValueError(f"{what} is no word but {reprlib.repr(given)}")
    return " ".join(given.split())
