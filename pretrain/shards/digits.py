"""Captioned scenes of handwritten digits: data to try the whole way on, made from what scikit-learn ships.

A scene is a cluttered dark square with two to four of scikit-learn's 8 x 8 handwritten digits in its corners,
in colours that no caption mentions. Five captions tell in varied words which digit stands where; the label is
the digit at the top left, where there always is one; the objects are in the JSON part. The handwritten
digits themselves are parted before anything is drawn: no test scene shows one that a training scene shows.

The same arguments give the same bytes under the same Pillow and scikit-learn. It is a toy: it shows that
training works, not how well on photographs.
"""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from pretrain.errors import UserError
from pretrain.philox import key
from pretrain.shards.entries import Entry, Listing, Ref, caption_lines, json_bytes
from pretrain.shards.objects import SceneObject, box_of_pixels
from pretrain.shards.pack import Packed, PackOptions, pack

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = ("in the top left", "in the top right", "in the bottom left", "in the bottom right")
LABELLED = 0  # the place whose digit is the class: top left
TEST_DIGITS = 5  # every fifth handwritten digit is kept for test scenes
CAPTIONS = 5
SHARD_SAMPLES = 1000

OPENINGS = ("", "", "a picture of ", "a scene with ", "there is ", "handwritten digits: ")
PHRASES = (
    "{a} {digit} {place}",
    "the digit {digit} {place}",
    "the number {digit} {place}",
    "a handwritten {digit} {place}",
)
TEMPLATES = (
    "the digit {c} in the top left.",
    "the number {c} in the top left.",
    "a picture of the digit {c} in the top left.",
    "a handwritten {c} in the top left.",
)


class Scene(NamedTuple):
    """One sample: PNG bytes, captions, label, boxes (x, y, width, height in pixels) and what each shows."""

    png: bytes
    captions: list[str]
    label: int
    boxes: list[list[int]]
    names: list[str]


@dataclass(frozen=True)
class Handwriting:
    """One part of scikit-learn's digits: images (n, 8, 8) uint8 ink from 0 to 255, and what each shows."""

    images: np.ndarray
    labels: np.ndarray


def handwriting(split: str) -> Handwriting:
    """The digits of `split`, train or test; they share none."""
    data = load_digits()
    ink = np.minimum(data.images * 16, 255).astype(np.uint8)
    mine = (np.arange(len(ink)) % TEST_DIGITS == 0) == (split == "test")
    return Handwriting(ink[mine], data.target[mine])


def scene(number: int, split: str, ink: Handwriting, *, seed: int, size: int) -> Scene:
    """Scene `number` of a split, a function of the arguments alone."""
    rng = np.random.default_rng(key(seed, "digits", split, number))
    others = rng.permutation(np.arange(1, len(PLACES)))[: rng.integers(1, 4)]
    places = [LABELLED, *sorted(others.tolist())]
    chosen = rng.integers(0, len(ink.labels), len(places))
    canvas = _background(rng, size)
    boxes = [_write(canvas, rng, ink.images[c], place, size) for c, place in zip(chosen, places)]
    names = [NAMES[ink.labels[c]] for c in chosen]
    captions = [_caption(rng, names, places) for _ in range(CAPTIONS)]
    return Scene(_png(canvas), captions, int(ink.labels[chosen[0]]), boxes, names)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) float32 in 0 to 255: a slope of two colours, strokes that are no digits, and noise."""
    corners = rng.uniform(0, 90, (2, 2, 3))
    slope = Image.fromarray(corners.astype(np.uint8)).resize((size, size), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(slope)
    for _ in range(rng.integers(2, 6)):
        ends = rng.integers(0, size, 4).tolist()
        colour = rng.integers(45, 135, 3)
        draw.line(ends, fill=tuple(colour.tolist()), width=1)
    return np.asarray(slope, np.float32) + rng.normal(0, 10, (size, size, 3)).astype(np.float32)


def _write(canvas: np.ndarray, rng: np.random.Generator, ink: np.ndarray, place: int, size: int) -> list[int]:
    """Write one digit into its corner, jittered in place, size and colour; its box."""
    cell = size / 2
    side = int(rng.integers(round(0.8 * cell), round(0.95 * cell) + 1))
    x, y = (int(index * cell + rng.uniform(0, cell - side)) for index in (place % 2, place // 2))
    digit = Image.fromarray(ink).resize((side, side), Image.Resampling.BICUBIC)
    alpha = np.asarray(digit, np.float32)[..., None] / 255
    colour = rng.uniform(145, 255, 3)
    canvas[y : y + side, x : x + side] += alpha * (colour.astype(np.float32) - canvas[y : y + side, x : x + side])
    return [x, y, side, side]


def _caption(rng: np.random.Generator, names: list[str], places: list[int]) -> str:
    phrase = PHRASES[rng.integers(len(PHRASES))]
    told = [
        phrase.format(a="an" if names[i] == "eight" else "a", digit=names[i], place=PLACES[places[i]])
        for i in range(len(names))
    ]
    return OPENINGS[rng.integers(len(OPENINGS))] + ", ".join(told[:-1]) + " and " + told[-1]


def _png(canvas: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_digits(
    out: Path, *, train: int = 8000, test: int = 1000, seed: int = 0, size: int = 48, shuffle_captions: bool = False
) -> list[Packed]:
    """Write `train` and `test` scenes as packed shards into `out`/train and `out`/test.

    `size`: side of the square in pixels, 48 or more. `shuffle_captions`: training scenes get the captions of others,
    for a control that can learn nothing of them. Raises UserError when a split is there already.
    """
    if train < 1 or test < 1 or size < 48:
        raise UserError(f"train and test must be at least 1 and size 48, got {train}, {test}, {size}")
    present = [out / split for split in ("train", "test") if (out / split).exists()]
    if present:
        raise UserError(f"{present[0]} is there already: remove it, or choose another folder")
    packed = [
        _pack(out / "train", _draw("train", train, seed, size, shuffle_captions), size),
        _pack(out / "test", _draw("test", test, seed, size, False), size),
    ]
    (out / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (out / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return packed


def _draw(split: str, scenes: int, seed: int, size: int, shuffle_captions: bool) -> list[Scene]:
    ink = handwriting(split)
    drawn = [scene(number, split, ink, seed=seed, size=size) for number in range(scenes)]
    if not shuffle_captions:
        return drawn
    others = np.random.default_rng(key(seed, "shuffled captions")).permutation(scenes).tolist()
    return [own._replace(captions=drawn[other].captions) for own, other in zip(drawn, others)]


def _pack(folder: Path, scenes: list[Scene], size: int) -> Packed:
    """One split; the packer reads images from files, so they pass through one temporary file."""
    entries, offset = [], 0
    with tempfile.NamedTemporaryFile() as file:
        for number, drawn in enumerate(scenes):
            file.write(drawn.png)
            entries.append(
                Entry(f"{number:06d}.png", Ref(Path(file.name), offset, len(drawn.png)), _parts(drawn, size))
            )
            offset += len(drawn.png)
        file.flush()
        options = PackOptions(shard_samples=SHARD_SAMPLES, shuffle_seed=None, threads=1)
        listing = Listing("digits", entries, classnames=list(NAMES))
        return pack(listing, folder, options, lambda _: "png")[0][0]


def _parts(drawn: Scene, size: int) -> dict[str, bytes | Ref]:
    objects = [SceneObject(box_of_pixels(b, (size, size)), name) for b, name in zip(drawn.boxes, drawn.names)]
    told = {"objects": [o.record() for o in objects], "width": size, "height": size}
    return {"txt": caption_lines(drawn.captions), "cls": str(drawn.label).encode(), "json": json_bytes(told)}
