"""What is this input, and what is in it: chooses the importer.

| format | input |
| --- | --- |
| folder | a folder of images (one subfolder a class, or flat), also inside a .tar or a compressed tar |
| table | a CSV or TSV of image and caption |
| coco | captions_X.json or instances_X.json, or the folder that holds `annotations/` |
| webdataset | tars of samples: taken as they are; inside a compressed tar they are packed anew |
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from pretrain.errors import UserError
from pretrain.shards.entries import Entry, Listing, Ref, Skip, image_part
from pretrain.shards.import_coco import find_annotations, list_coco
from pretrain.shards.import_folder import list_folder, list_tar
from pretrain.shards.import_table import list_table
from pretrain.shards.index import ShardIndex, build_index, compression

FORMATS = ("folder", "table", "coco", "webdataset")
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(31),  # 31: with gzip's header and checksum
    "bzip2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}
TABLES = (".csv", ".tsv", ".txt")


def guess_format(path: Path) -> str:
    """One of FORMATS, by what the input is; UserError when that cannot be told."""
    if path.is_dir():
        return _guess_folder(path)
    if not path.exists():
        raise UserError(f"no {path}")
    if path.suffix.lower() in TABLES:
        return "table"
    if path.suffix.lower() == ".json":
        return "coco"
    if path.suffix.lower() == ".zip":
        raise UserError(f"{path} is a zip: unzip it and give the folder")
    return guess_tar(path)


def _guess_folder(path: Path) -> str:
    if any(path.glob("*.tar")):
        return "webdataset"
    if any((path / "annotations").glob("*_*.json")):
        return "coco"
    if tables := sorted(p for p in path.iterdir() if p.suffix.lower() in (".csv", ".tsv")):
        raise UserError(
            f"{path} holds {tables[0].name}: for its captions give that file (and --images FOLDER); "
            "for the images alone add --format folder"
        )
    return "folder"


def guess_tar(path: Path) -> str:
    """Samples with more than an image in them, or images that lie flat, are webdataset's; else an image
    folder."""
    index = build_index(path)
    if not len(index):
        return "webdataset"
    folders = False
    for key, parts in zip(index.keys, index.block(0, len(index))):
        if image_part(parts) and len(parts) > 1:
            return "webdataset"
        folders |= "/" in key.removeprefix("./")
    return "folder" if folders else "webdataset"


def unpack(path: Path, folder: Path) -> tuple[Path, list[Skip]]:
    """A compressed tar, decompressed into a file in `folder` (its members can then be read in any order).

    What could be decompressed of a damaged one is kept; the damage is a skip.
    """
    kind = compression(path)
    if kind is None or kind not in DECOMPRESSORS:
        raise UserError(f"{path} is compressed with {kind}: decompress it first")
    plain = folder / (path.name.partition(".")[0] + ".tar")
    with open(path, "rb") as packed, open(plain, "wb") as out:
        problem = _decompress(packed, out, DECOMPRESSORS[kind])
    return plain, [Skip(path.name, "compressed tar damaged", problem)] if problem else []


def _decompress(packed: BinaryIO, out: BinaryIO, make: Callable[[], Any]) -> str | None:
    """Write what can be decompressed, stream after stream; what stopped it early, or None."""
    stream = make()
    while data := packed.read(1 << 16):
        data = data.lstrip(b"\0") if stream.eof else data  # padding behind a stream
        while data:
            stream = make() if stream.eof else stream
            try:
                plain = stream.decompress(data)
            except (zlib.error, lzma.LZMAError, OSError) as error:
                return str(error)
            out.write(plain)
            data = stream.unused_data.lstrip(b"\0")
    return None if stream.eof else "cut short"


def list_samples(tar: Path) -> Listing:
    """Samples of a WebDataset tar, to be packed anew: every member is kept."""
    index: ShardIndex = build_index(tar)
    listing = Listing("webdataset")
    listing.skips = [Skip(key or tar.name, "damage in the tar", reason) for key, reason in index.problems]
    for key, parts in zip(index.keys, index.block(0, len(index))):
        refs: dict[str, bytes | Ref] = {ext: Ref(tar, *place) for ext, place in parts.items()}
        image = image_part(parts)
        if image is None:
            listing.skips.append(Skip(key, "sample without an image", f"it has: {', '.join(parts)}"))
            continue
        ref = refs.pop(image)
        assert isinstance(ref, Ref)
        listing.entries.append(Entry(f"{key}.{image}", ref, refs))
    return listing


def list_input(
    path: Path,
    form: str,
    *,
    images: Path | None = None,
    columns: str | None = None,
    instances: Path | None = None,
    subdir: str | None = None,
    flat: bool = False,
    shown: Path | None = None,
) -> Listing:
    """Everything of an input of one of FORMATS.

    A compressed tar must have been through `unpack`; messages then call it by its own name, `shown`.
    """
    if form == "table":
        return list_table(path, images=images, columns=columns)
    if form == "coco":
        notes = find_annotations(path, subdir) if path.is_dir() else path
        return list_coco(notes, images=images, instances=instances)
    if form == "webdataset":
        return list_samples(path)
    if path.is_dir():
        return list_folder(path, subdir=subdir, flat=flat)
    return list_tar(path, subdir=subdir, flat=flat, shown=shown)
