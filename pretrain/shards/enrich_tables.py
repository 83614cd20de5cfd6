"""Objects that people annotated, out of COCO's JSON or Open Images' tables, found by a sample's name.

All annotations are held in memory, about 300 bytes a box: 4 GB for the whole of Open Images, so give large sets the
tables of the part that the shards are of.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from sys import intern

from pretrain.errors import UserError
from pretrain.shards.enrich import Annotated, Sample
from pretrain.shards.entries import Skip, safe_key
from pretrain.shards.import_coco import load_coco, objects_by_image
from pretrain.shards.objects import Box, SceneObject, best_first, box_of_shares

BOX_COLUMNS = frozenset({"ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax"})
RELATION_COLUMNS = frozenset({"ImageID", "LabelName1", "LabelName2", "XMin1", "XMax1", "YMin1", "YMax1"})
SAME = 0.01  # the corners of one box differ by less between two tables


class Table:
    """Objects by image. A sample is looked up by the `image_id` of its JSON, else by its key without folders.

    `skips` are the annotations that were left out.
    """

    features = False

    def __init__(
        self,
        name: str,
        by_id: Mapping[str, list[SceneObject]],
        by_name: Mapping[str, list[SceneObject]],
        skips: list[Skip],
    ) -> None:
        self.name, self._by_id, self._by_name, self.skips = name, by_id, by_name, skips

    def __call__(self, samples: Sequence[Sample]) -> list[Annotated | None]:
        return [self._find(sample) for sample in samples]

    def _find(self, sample: Sample) -> Annotated | None:
        found = self._by_id.get(str(sample.told.get("image_id")))
        if found is None:
            found = self._by_name.get(safe_key(PurePosixPath(sample.key).name))
        return None if found is None else Annotated(best_first(found))


def coco_objects(path: Path) -> Table:
    """The objects of an instances_X.json; UserError where it is none."""
    skips: list[Skip] = []
    instances = load_coco(path)
    try:
        objects = objects_by_image(instances, skips)
        by_id = {str(image["id"]): objects.get(image["id"], []) for image in instances["images"]}
        files = {PurePosixPath(image["file_name"]): by_id[str(image["id"])] for image in instances["images"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} does not have COCO's form ({type(error).__name__}: {error})") from error
    by_name = {safe_key(file.name): found for file, found in files.items()}
    return Table(path.name, by_id, by_name | {safe_key(str(file)): found for file, found in files.items()}, skips)


def open_images_objects(folder: Path) -> Table:
    """The objects of the tables in a folder, which are told by their columns, whatever they are called.

    Boxes (`ImageID,LabelName,XMin,XMax,YMin,YMax`, also `Confidence`), names of classes and attributes (two columns:
    id, name), and, if they are there, relations (`LabelName1,LabelName2,XMin1,…`): where one says that a thing `is`
    something, that becomes an attribute of the box it is said of. Boxes around groups are left out.
    Raises UserError where boxes or names are missing, or a table cannot be read.
    """
    boxes, relations, names = _tables(folder)
    skips: list[Skip] = []
    found: dict[str, list[SceneObject]] = {}

    def take_box(row: Row) -> None:
        if row.get("IsGroupOf") != "1":
            score = float(row.get("Confidence") or 1)
            if not math.isfinite(score):
                raise ValueError(f"Confidence {score}")
            found.setdefault(row["ImageID"], []).append(SceneObject(_box(row), names[row["LabelName"]], (), score))

    def take_relation(row: Row) -> None:
        if (row.get("RelationshipLabel") or row.get("RelationLabel")) == "is":  # the latter before V6
            label, attribute = names[row["LabelName1"]], names[row["LabelName2"]]
            _add_attribute(found.get(row["ImageID"], []), label, _box(row, "1"), attribute)

    _each(boxes, take_box, skips)
    _each(relations, take_relation, skips)
    return Table("Open Images", found, {safe_key(image): objects for image, objects in found.items()}, skips)


Row = dict[str, str]


def _tables(folder: Path) -> tuple[list[Path], list[Path], dict[str, str]]:
    """Tables of boxes, tables of relations, and the names of classes and attributes by id."""
    boxes: list[Path] = []
    relations: list[Path] = []
    names: dict[str, str] = {}
    for path in sorted(folder.glob("*.csv")):
        columns = next(_lines(path), [])
        if set(columns) >= BOX_COLUMNS:
            boxes.append(path)
        elif set(columns) >= RELATION_COLUMNS:
            relations.append(path)
        elif len(columns) == 2:
            # attributes are called "(made of)Wood"
            named = {row[0]: re.sub(r"\(.*?\)", "", row[1]).strip() for row in _lines(path) if len(row) == 2}
            names |= {of: intern(name) for of, name in named.items() if name}
    if not boxes or not names:
        what = f"table with the columns {', '.join(sorted(BOX_COLUMNS))}" if not boxes else "class descriptions"
        raise UserError(f"{folder} holds no {what} among its *.csv: download Open Images' annotations into it")
    return boxes, relations, names


def _lines(path: Path) -> Iterator[list[str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            yield from csv.reader(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV in UTF-8: {error}") from error


def _each(paths: Sequence[Path], take: Callable[[Row], None], skips: list[Skip]) -> None:
    """Take every row of the tables; those that are wrong are skipped."""
    for path in paths:
        lines = _lines(path)
        columns = next(lines)
        for number, line in enumerate(lines, start=2):
            try:
                take(dict(zip(columns, line)))
            except KeyError as error:
                skips.append(Skip(f"{path.name}:{number}", "column or name of a class missing", str(error)))
            except ValueError as error:
                skips.append(Skip(f"{path.name}:{number}", "wrong box", str(error)))


def _box(row: Row, which: str = "") -> Box:
    return box_of_shares([float(row[f"{side}{which}"]) for side in ("XMin", "YMin", "XMax", "YMax")])


def _add_attribute(objects: list[SceneObject], label: str, box: Box, attribute: str) -> None:
    """To the object of this label whose box is the same, where there is one."""
    for i, known in enumerate(objects):
        same = known.label == label and max(abs(a - b) for a, b in zip(known.box, box)) < SAME
        if same and attribute not in known.attrs:
            objects[i] = known._replace(attrs=(*known.attrs, attribute))
            return
