"""CSV and TSV of image and caption: rows of the same image are its captions.

Columns are found by the header's names, or given by name or number. Rows are never silently lost: each one
that cannot be used is a skip with its line number.
"""

from __future__ import annotations

import csv
import io
import itertools
from pathlib import Path
from typing import Literal

from pretrain.errors import UserError
from pretrain.shards.entries import Entry, Listing, Ref, Skip, caption_lines, caption_problem, printable

IMAGE_NAMES = (
    "image",
    "filename",
    "file_name",
    "filepath",
    "path",
    "file",
    "image_path",
    "image_name",
    "img",
)
CAPTION_NAMES = ("caption", "captions", "title", "text", "comment", "description", "raw", "sentence")
PROBE = 50  # rows looked at for whether the images are where they should be

Row = tuple[int, list[str]]  # line number, cells


def list_table(path: Path, *, images: Path | None = None, columns: str | None = None) -> Listing:
    """`images`: the folder that image names are relative to (the table's own by default).
    `columns`: "IMAGE,CAPTION" by header name, or by number from 0 for a table without header.
    """
    folder = images or path.parent
    rows = _rows(path)
    if not rows:
        raise UserError(f"{path} has no rows")
    (image_at, caption_at), has_header = _columns(path, rows[0][1], folder, columns)
    captions: dict[str, list[str]] = {}
    skips: list[Skip] = []
    for line, cells in rows[has_header:]:
        if max(image_at, caption_at) >= len(cells):
            skips.append(Skip(f"{path.name}:{line}", "row without a caption", f"{len(cells)} column(s)"))
            continue
        name, caption = cells[image_at].strip(), cells[caption_at].strip()
        good = captions.setdefault(name, [])
        if problem := caption_problem(caption):
            skips.append(Skip(f"{path.name}:{line} {printable(name)}", problem))
        else:
            good.append(caption)
    _probe(path, folder, list(captions))
    entries = []
    for name, good in captions.items():
        if good:
            entries.append(Entry(printable(name), Ref(folder / name), {"txt": caption_lines(good)}))
        else:
            skips.append(Skip(printable(name), "image without a usable caption"))
    return Listing("table", entries, skips)


def _rows(path: Path) -> list[Row]:
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is UTF-16: save it as UTF-8")
    # surrogates carry what is not UTF-8 to the cell it is in, so that one bad caption costs one caption
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    delimiter = _delimiter(path, text)
    csv.field_size_limit(1 << 24)
    # in TSV a quotation mark is a character like others; in CSV it may enclose line breaks
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
    try:
        return [(reader.line_num, cells) for cells in reader if any(cells)]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from error


def _delimiter(path: Path, text: str) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    first = text.partition("\n")[0]
    return max("\t|,;", key=lambda c: (c in first and c in "\t|", first.count(c)))


def _columns(path: Path, first: list[str], folder: Path, columns: str | None) -> tuple[tuple[int, int], bool]:
    """Places of image and caption, and whether the first row is a header."""
    header = [cell.strip().lower() for cell in first]
    if columns:
        wanted = [name.strip() for name in columns.split(",")]
        if len(wanted) != 2:
            raise UserError(f"--columns {columns}: give two, as in image,caption or 0,1")
        if all(name.isdecimal() for name in wanted):
            return (int(wanted[0]), int(wanted[1])), _known(header)
        missing = [name for name in wanted if name.lower() not in header]
        if missing:
            raise UserError(
                f"{path} has no column {missing[0]!r}; its first row is: {', '.join(map(printable, first))}"
            )
        return (header.index(wanted[0].lower()), header.index(wanted[1].lower())), True
    if _known(header):
        image = next(header.index(name) for name in IMAGE_NAMES if name in header)
        return (image, next(header.index(name) for name in CAPTION_NAMES if name in header)), True
    if len(first) >= 2 and (folder / first[0].strip()).is_file():
        return (0, 1), False
    raise UserError(
        f"{path}: which column is the image, which the caption? "
        f"Its first row is: {', '.join(map(printable, first))}. "
        f"Give --columns NAME,NAME, or --columns 0,1 for a table without header, and --images FOLDER"
    )


def _known(header: list[str]) -> bool:
    return bool({*IMAGE_NAMES} & {*header} and {*CAPTION_NAMES} & {*header})


def _probe(path: Path, folder: Path, names: list[str]) -> None:
    probed = list(itertools.islice(names, PROBE))
    if probed and not any((folder / name).is_file() for name in probed):
        raise UserError(
            f"none of the first {len(probed)} images of {path} is in {folder} "
            f"(such as {printable(probed[0])}): name their folder with --images"
        )
