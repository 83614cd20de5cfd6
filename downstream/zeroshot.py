"""Zero-shot classification: an image takes the class whose written name lies nearest to it.

The convention of CLIP (Radford et al. 2021, §3.1.4) as CLIP_benchmark runs it: each class name is put into
every template, each text's vector is brought to unit length, the templates' mean is taken and brought to unit
length again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from downstream.classification import Answers, answer
from downstream.samples import Samples
from pretrain.errors import UserError

PLAIN = ["a photo of a {c}."]  # where the data set has no templates of its own
BLOCK = 1024  # images scored at once: memory is BLOCK × classes


def names_and_templates(
    samples: Samples, names: Path | None = None, templates: Path | None = None
) -> tuple[list[str], list[str]]:
    """Class names and templates of these files, else of those beside the shards; else the plain template.

    Raises:
        UserError: no classnames.txt, or a file that cannot be used.
    """
    names = names or samples.beside("classnames.txt")
    if names is None:
        raise UserError(f"{samples.spec}: no classnames.txt there (one name a line, line = class)")
    templates = templates or samples.beside("zeroshot_classification_templates.txt")
    forms = read_lines(templates) if templates else PLAIN
    check_templates(forms, str(templates))
    return read_lines(names), forms


def check_classes(labels: np.ndarray, classnames: list[str], samples: Samples) -> None:
    """UserError unless there are classes (`labels` (N,), -1 = none) and all of them have names."""
    if not (labels >= 0).any():
        raise UserError(f"{samples.spec}: no sample has an image and a class (a `cls` beside the image)")
    if labels.max() >= len(classnames):
        key = samples.key(int(labels.argmax()))
        raise UserError(
            f"{samples.spec}: {key} is of class {labels.max()}, but there are {len(classnames)} class names"
        )


def read_lines(path: Path) -> list[str]:
    """The lines of a text file; blank ones at its end are none.

    Raises:
        UserError: no such file, not UTF-8, nothing in it, or a blank line (which class would it be?).
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    if lines == [""]:
        raise UserError(f"{path}: is empty")
    if "" in lines:
        raise UserError(f"{path}: line {lines.index('') + 1} is blank")
    return lines


def check_templates(templates: list[str], where: str) -> None:
    """UserError, with the line, for a template that has no place for the class name or other braces."""
    for number, template in enumerate(templates, 1):
        try:
            filled = template.format(c="\0") if "{c}" in template else ""
        except (LookupError, ValueError):
            filled = ""
        if "\0" not in filled:
            raise UserError(
                f"{where}, line {number}: {template!r} must hold {{c}} for the class name and no other braces"
            )


def prompts(classnames: list[str], templates: list[str]) -> list[str]:
    """Every class in every template, class after class: (classes · templates) texts."""
    return [template.format(c=name) for name in classnames for template in templates]


def classifier(vectors: np.ndarray, classes: int) -> np.ndarray:
    """(classes, D) unit rows of the prompts' unit vectors (classes · templates, D)."""
    mean = vectors.reshape(classes, -1, vectors.shape[1]).astype(np.float64).mean(1)
    length = np.linalg.norm(mean, axis=1, keepdims=True)
    return np.divide(mean, length, out=np.zeros_like(mean), where=length > 0).astype(np.float32)


def classify(images: np.ndarray, names: np.ndarray, labels: np.ndarray) -> Answers:
    """Answers for images (Q, D) by class names (C, D), unit rows; labels (Q,) below C.

    The scale (100 in CLIP) changes no order and is left out.
    """
    ranks, predicted = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start in range(0, len(labels), BLOCK):
        rows = slice(start, start + BLOCK)
        block_ranks, block_predicted = answer(images[rows] @ names.T, labels[rows])
        ranks.append(block_ranks)
        predicted.append(block_predicted)
    return Answers(np.concatenate(ranks), np.concatenate(predicted), labels, len(names), len(names))
