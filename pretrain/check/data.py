"""What the shards of a recipe hold, and what of it the objectives miss; nothing is written."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pretrain.errors import UserError
from pretrain.objectives.joint import Joint
from pretrain.recipe import Recipe
from pretrain.shards import roi
from pretrain.shards.entries import IMAGE_EXTENSIONS
from pretrain.shards.index import KINDS, ShardIndex, build_index, kept_arrays, stamp_of
from pretrain.shards.labels import CLASS_EXTENSION
from pretrain.shards.objects import read_objects
from pretrain.shards.source import Shard, Source, expand_shards
from pretrain.views.text import build_tokenizer

LOOKED_AT = 8
"""Shards of a source whose members are counted, spread over it."""
READ = 32
"""Members of a kind that are read, spread over what is looked at."""
IMAGE, CAPTION, SUMMARY, OBJECTS = "image", "txt", "summary.txt", "json"
MEMBERS = {
    "captions": CAPTION,
    "summaries": SUMMARY,
    "objects": OBJECTS,
    "regions": roi.MEMBER,
    "classes": CLASS_EXTENSION,
}


@dataclass
class Held:
    """What was found of one source."""

    name: str
    source: Source | None = None
    """None: it cannot be opened, and `problem` says why."""
    problem: str | None = None
    looked_at: int = 0
    """Samples whose members were counted."""
    counts: Counter[str] = field(default_factory=Counter)
    """Members by extension, of those."""
    damaged: list[str] = field(default_factory=list)
    """Places of the tars that cannot be read."""
    with_objects: int = 0
    """Of the `json` members that were read, those that list objects."""
    jsons: int = 0
    captions: list[str] = field(default_factory=list)
    """A few, to count their tokens."""

    def share(self, extension: str) -> float:
        """Samples that have the member, as a share of those looked at."""
        names = IMAGE_EXTENSIONS if extension == IMAGE else (extension,)
        share = min(1.0, sum(self.counts[name] for name in names) / max(1, self.looked_at))
        return share * self.with_objects / max(1, self.jsons) if extension == OBJECTS else share

    def facts(self) -> dict[str, Any]:
        """For the report."""
        if self.source is None:
            return {"source": self.name, "missing": self.problem}
        members = {n: f"{self.share(e):.0%}" for n, e in MEMBERS.items() if self.counts[e]}
        return {
            "source": self.name,
            "shards": len(self.source.shards),
            "samples": self.source.samples,
            "counted_in": self.looked_at,
            "images": f"{self.share(IMAGE):.0%}",
            **members,
            "damaged_places": len(self.damaged),
        }


def look(recipe: Recipe) -> list[Held]:
    """What every source of the recipe holds."""
    return [_look(s.shards) for s in recipe.data.sources]


def caption_tokens(recipe: Recipe, held: list[Held]) -> int:
    """Mean length of the captions that were read; the context where there are none."""
    tokenizer = build_tokenizer(recipe.model.text)
    if tokenizer is None or recipe.model.text is None:
        return 0
    captions = [caption for h in held for caption in h.captions if caption.strip()]
    if not captions:
        return recipe.model.text.context
    return math.ceil((tokenizer(captions) > 0).sum(dim=1).float().mean().item())


def _look(spec: str | list[str]) -> Held:
    held = Held(spec if isinstance(spec, str) else ", ".join(spec))
    try:
        shards = [_noted(shard) for shard in expand_shards(spec)]
        if not shards:
            raise UserError(f"no shards in {spec!r}: name a folder of *.tar, a glob, or a list of tars")
        held.source = Source(shards)
        for index in map(_index, _spread([s.path for s in shards], LOOKED_AT)):
            _count(index, held)
    except UserError as error:
        held.problem = str(error)
        held.source = None
    return held


def _noted(shard: Shard) -> Shard:
    """With its number of samples: from beside it where that is kept, else from its headers, which are not kept."""
    if shard.samples is not None:
        return shard
    kept = kept_arrays(shard.path, "idx", stamp_of(shard.path), ("samples",))
    return Shard(shard.path, int(kept["samples"]) if kept else len(build_index(shard.path)))


def _index(path: Any) -> ShardIndex:
    arrays = kept_arrays(path, "idx", stamp_of(path), [*KINDS])
    return ShardIndex(path, arrays) if arrays else build_index(path)


def _count(index: ShardIndex, held: Held) -> None:
    held.looked_at += len(index)
    held.counts.update(index.extension_counts())
    held.damaged += [f"{index.path}: {line}" for line in index.damage]
    for data in _members(index, OBJECTS):
        held.jsons += 1
        held.with_objects += _lists_objects(data)
    held.captions += [line for data in _members(index, CAPTION) for line in data.decode(errors="replace").splitlines()]


def _lists_objects(data: bytes) -> bool:
    try:
        return bool(read_objects(data).objects)
    except ValueError:
        return False


def _members(index: ShardIndex, extension: str) -> list[bytes]:
    """READ members of a kind, spread over the shard."""
    _, offsets, sizes = index.column(extension)
    places = list(zip(offsets.tolist(), sizes.tolist()))
    with open(index.path, "rb") as file:
        return [os.pread(file.fileno(), size, offset) for offset, size in _spread(places, READ)]


def _spread(items: list, most: int) -> list:
    return items if len(items) <= most else [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def missing(held: list[Held], joint: Joint, recipe: Recipe) -> tuple[list[str], list[str]]:
    """(problems, notes): what the objectives read and the samples do not have."""
    problems: list[str] = []
    notes: list[str] = []
    for h in held:
        if h.source is None:
            continue
        if h.damaged:
            notes.append(f"{h.name}: {h.damaged[0]} (all: python -m pretrain verify {h.name})")
        for extension, readers, required in _needs(joint, recipe.model.image_size):
            share = h.share(extension)
            if share < 1 - recipe.data.max_damaged if required else not share:
                problems.append(_lacks(h.name, extension, readers, share, required))
            elif share < 1:
                notes.append(f"{h.name}: {share:.0%} of the samples have {_said(extension)}, which {readers} reads")
    return problems, notes


def _needs(joint: Joint, size: int) -> Iterable[tuple[str, str, bool]]:
    """(extension, who reads it, whether a sample without it is damaged), each extension once."""
    found: dict[str, tuple[set[str], bool]] = {}
    for name, objective in joint.by_name.items():
        views = [v for v in objective.text_views() if not v.after]
        wanted = [(v.extension, v.required) for v in views]
        wanted += [(IMAGE, True)] if objective.image_views(size) else []
        wanted += [(OBJECTS if v.stored_dim is None else roi.MEMBER, False) for v in objective.region_views()]
        if getattr(objective.options, "classes", None):
            wanted.append((CLASS_EXTENSION, True))
        for extension, required in wanted:
            readers, before = found.get(extension, (set(), False))
            found[extension] = readers | {name}, before or required
    return [(extension, ", ".join(sorted(readers)), required) for extension, (readers, required) in found.items()]


def _lacks(name: str, extension: str, readers: str, share: float, required: bool) -> str:
    has = f"{share:.1%}" if share else "none"
    if required:
        what = "the run would stop at once" if not share else "more are without than data.max_damaged allows"
    else:
        what = "its terms would be 0"
    has += f" of the samples have {_said(extension)}"
    return f"{name}: {has}, which objective {readers} reads: {what}. {_cure(extension, name)}"


def _said(extension: str) -> str:
    return {
        IMAGE: "an image",
        CAPTION: "a caption (.txt)",
        SUMMARY: "a summary (.summary.txt)",
        OBJECTS: "objects (.json)",
        roi.MEMBER: "a detector's regions (.roi.npy)",
        CLASS_EXTENSION: "a class (.cls)",
    }.get(extension, f".{extension}")


def _cure(extension: str, name: str) -> str:
    return {
        IMAGE: "See what is in the tars: tar tf SHARD | head",
        CAPTION: "Pack a table of captions: python -m pretrain pack captions.tsv --images DIR --out SHARDS; or train "
        "an objective that needs none (swav, dino, moco)",
        SUMMARY: f"Make them: python -m pretrain enrich {name} --out NEW --summary first-sentence",
        OBJECTS: f"Make them: python -m pretrain enrich {name} --out NEW --coco instances.json (or --open-images, "
        "--detector)",
        roi.MEMBER: f"Make them: python -m pretrain enrich {name} --out NEW --detector … --store-features, or cut "
        "regions from the tower's own map: model.regions.stored_dim=null",
        CLASS_EXTENSION: "Pack one folder a class: python -m pretrain pack FOLDER --out SHARDS",
    }.get(extension, "")
