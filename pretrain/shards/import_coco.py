"""COCO annotations: captions into `.txt`, objects into `.json`.

`.json` holds image_id, width, height and objects, in the form of `pretrain.shards.objects`: the category's name is
the label, the score 1. Crowd annotations (iscrowd = 1: one box around many) are left out, as are boxes without area
inside the image. Segmentations are not kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.shards.entries import Entry, Listing, Ref, Skip, caption_lines, caption_problem, json_bytes
from pretrain.shards.objects import SceneObject, box_of_pixels


def list_coco(path: Path, *, images: Path | None = None, instances: Path | None = None) -> Listing:
    """`path`: captions_X.json or instances_X.json. The other of the two, and the image folder, are looked for
    where COCO keeps them (beside it, and in ../X) unless given."""
    captions = path if not path.name.startswith("instances_") else _beside(path, "captions_")
    instances = instances or (path if captions != path else _beside(path, "instances_"))
    split = path.stem.partition("_")[2]
    images = images or path.parent.parent / split
    if not images.is_dir():
        raise UserError(f"no image folder {images}: name it with --images")
    try:
        return _listing(load_coco(captions), load_coco(instances), images)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} does not have COCO's form ({type(error).__name__}: {error})") from error


def find_annotations(folder: Path, subdir: str | None) -> Path:
    """The one annotation file of a COCO folder that `subdir` (train2017, …) means."""
    found = sorted((folder / "annotations").glob("captions_*.json"))
    found = found or sorted((folder / "annotations").glob("instances_*.json"))
    chosen = [path for path in found if subdir is None or path.stem.endswith(f"_{subdir}")]
    if len(chosen) != 1:
        splits = [path.stem.partition("_")[2] for path in found]
        raise UserError(f"{folder} has the parts {', '.join(splits)}: choose one, as in --subdir {splits[0]}")
    return chosen[0]


def _beside(path: Path, prefix: str) -> Path | None:
    other = path.with_name(prefix + path.name.partition("_")[2])
    return other if other.exists() else None


def load_coco(path: Path | None) -> dict[str, Any]:
    """What an annotation file holds, nothing where there is none; UserError where it is not COCO's."""
    if path is None:
        return {}
    try:
        loaded = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(loaded, dict) or "images" not in loaded or "annotations" not in loaded:
        raise UserError(f"{path} does not have COCO's form: it needs 'images' and 'annotations'")
    return loaded


def _listing(captions: dict[str, Any], instances: dict[str, Any], folder: Path) -> Listing:
    listing = Listing("coco")
    texts: dict[Any, list[str]] = {}
    for note in captions.get("annotations", []):
        if problem := caption_problem(note["caption"]):
            listing.skips.append(Skip(f"annotation {note.get('id')}", problem))
        else:
            texts.setdefault(note["image_id"], []).append(note["caption"])
    objects = objects_by_image(instances, listing.skips)
    seen: set[str] = set()
    for image in captions.get("images") or instances.get("images", []):
        name = image["file_name"]
        lines = texts.get(image["id"], [])
        if name in seen:
            listing.skips.append(Skip(name, "the same name again", f"image_id {image['id']}"))
        elif captions and not lines:
            listing.skips.append(Skip(name, "image without a usable caption"))
        else:
            parts: dict[str, bytes | Ref] = {"txt": caption_lines(lines)} if lines else {}
            parts["json"] = json_bytes(_description(image, objects.get(image["id"], [])))
            listing.entries.append(Entry(name, Ref(folder / name), parts))
        seen.add(name)
    return listing


def _description(image: dict[str, Any], objects: list[SceneObject]) -> dict[str, Any]:
    known: dict[str, Any] = {field: image[field] for field in ("width", "height") if field in image}
    return {"image_id": image["id"], **known, "objects": [o.record() for o in objects]}


def objects_by_image(instances: dict[str, Any], skips: list[Skip]) -> dict[Any, list[SceneObject]]:
    """The objects of a loaded instances_X.json by image id; what is left out is added to `skips`."""
    names = {category["id"]: category["name"] for category in instances.get("categories", [])}
    images = {image["id"]: image for image in instances.get("images", [])}
    objects: dict[Any, list[SceneObject]] = {}
    for note in instances.get("annotations", []):
        image = images.get(note["image_id"])
        if note.get("iscrowd") or image is None:
            continue
        try:
            box = box_of_pixels(note["bbox"], (image.get("width", 0), image.get("height", 0)))
        except ValueError as error:
            skips.append(Skip(f"annotation {note.get('id')}", "box without area", str(error)))
        else:
            objects.setdefault(note["image_id"], []).append(SceneObject(box, names[note["category_id"]]))
    return objects
