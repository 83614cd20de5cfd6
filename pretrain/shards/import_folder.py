"""Image folders, on disk or inside a tar: one subfolder a class, or flat.

Folders that merely wrap the rest (`cifar10/` around `train/` and `test/`) are looked through. Which part of a
data set to take is said with `subdir`; splits are never mistaken for classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pretrain.errors import UserError
from pretrain.shards.entries import Entry, Listing, Ref, Skip, is_image_name, printable
from pretrain.shards.tarwalk import Gap, walk

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}

Found = list[tuple[str, Ref]]  # path relative to the input, with "/"


def list_folder(root: Path, *, subdir: str | None = None, flat: bool = False) -> Listing:
    """Every image under a folder."""
    found = sorted((printable(p.relative_to(root).as_posix()), Ref(p)) for p in _files(root))
    return _listing(root, found, [], subdir, flat)


def list_tar(tar: Path, *, subdir: str | None = None, flat: bool = False, shown: Path | None = None) -> Listing:
    """Every image of an image folder inside a tar, damage passed over; messages call the tar `shown`."""
    found, skips = [], []
    fd = os.open(tar, os.O_RDONLY)
    try:
        for item in walk(fd, os.fstat(fd).st_size):
            if isinstance(item, Gap):
                skips.append(Skip(item.name or tar.name, "damage in the tar", item.reason))
            else:
                found.append((item.name.removeprefix("./"), Ref(tar, item.offset, item.size)))
    finally:
        os.close(fd)
    return _listing(shown or tar, sorted(found), skips, subdir, flat)


def _files(root: Path) -> Iterator[Path]:
    """Files under a folder, through links to folders, each folder once."""
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        yield from (Path(folder) / name for name in files)


def _listing(where: Path, found: Found, skips: list[Skip], subdir: str | None, flat: bool) -> Listing:
    found = [(name, ref) for name, ref in found if not name.rpartition("/")[2].startswith(".")]
    found = _inside(_unwrap(found), subdir, where)
    images: dict[str, Ref] = {}
    for name, ref in found:
        if not is_image_name(name):
            skips.append(Skip(name, "not an image by its name"))
        elif name in images:
            skips.append(Skip(name, "the same name again"))
        else:
            images[name] = ref
    if not images:
        raise UserError(f"no images in {where}{f' under {subdir}' if subdir else ''} (looked for .jpg, .png, .webp …)")
    classes = [] if flat else _classes(where, list(images))
    label = {name: str(i).encode() for i, name in enumerate(classes)}
    entries = [Entry(name, ref, {"cls": label[name.split("/")[0]]} if label else {}) for name, ref in images.items()]
    return Listing("folder", entries, skips, classes)


def _unwrap(found: Found) -> Found:
    """Without the folders that hold all images between them."""
    while True:
        heads = {name.partition("/")[0] if "/" in name else "" for name, _ in found if is_image_name(name)}
        if len(heads) != 1 or heads == {""}:
            return found
        head = heads.pop() + "/"
        found = [(name.removeprefix(head), ref) for name, ref in found if name.startswith(head)]


def _inside(found: Found, subdir: str | None, where: Path) -> Found:
    if subdir is None:
        return found
    prefix = subdir.strip("/") + "/"
    for start in (prefix, *_tails(prefix)):
        inside = [(name.removeprefix(start), ref) for name, ref in found if name.startswith(start)]
        if inside:
            return inside
    there = sorted({name.partition("/")[0] for name, _ in found if "/" in name})
    raise UserError(f"no folder {subdir!r} in {where}; it has: {', '.join(there[:10]) or 'no subfolders'}")


def _tails(prefix: str) -> list[str]:
    """`cifar10/train/` also means `train/` once the wrapping folder is looked through."""
    parts = prefix.split("/")
    return ["/".join(parts[i:]) for i in range(1, len(parts) - 1)]


def _classes(where: Path, names: list[str]) -> list[str]:
    """Class names: the first folder of each image, sorted; none when all lie flat."""
    heads = {name.split("/")[0] if "/" in name else "" for name in names}
    if heads == {""}:
        return []
    if heads <= SPLITS:
        first = "train" if "train" in heads else min(heads)
        raise UserError(
            f"{where} is divided into {' and '.join(sorted(heads))}: choose one, as in --subdir {first} "
            "(or --flat to take all together, without classes)"
        )
    if "" in heads:
        raise UserError(
            f"{where} has images beside its folders {', '.join(sorted(heads - {''})[:5])}: "
            "--flat takes all without classes, --subdir one folder"
        )
    return sorted(heads)
