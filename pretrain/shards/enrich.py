"""Shards again, with objects and summaries beside what they hold: a new tar a tar, the same samples in the same order.

Objects go into `.json` (`pretrain.shards.objects`), with `detector`, where they are from; a detector's features into
`.roi.npy`; summaries into `.summary.txt`, one a line, with `summary_model`, the rule, in `.json`. A sample that
cannot be understood is passed on as it is, byte for byte, and listed in `damaged.jsonl` with the reason; so is what
cannot be read of a tar.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from pretrain.errors import UserError
from pretrain.shards import roi
from pretrain.shards.entries import Listing, caption_lines, read_captions
from pretrain.shards.images import BadImage
from pretrain.shards.index import ShardIndex
from pretrain.shards.objects import SceneObject, read_json
from pretrain.shards.pack import PackOptions, ShardWriter, unfinished, write_lines
from pretrain.shards.source import Source
from pretrain.shards.summaries import SUMMARIES

AT_ONCE = 8  # samples an annotator is asked for together
SUMMARY = "summary.txt"


@dataclass
class Sample:
    """One sample on its way: `told` is what its JSON says, `wrong` why something was not done.

    A `sealed` one has a JSON that cannot be read: nothing is put in.
    """

    key: str
    members: dict[str, bytes]
    told: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    sealed: bool = False

    def tell(self, **facts: Any) -> None:
        """Put these into the JSON too."""
        self.told |= facts
        self.members["json"] = json.dumps(self.told).encode()


class Annotated(NamedTuple):
    """What is in an image, the best scored first, and what a detector saw of each: rows as `roi.npy` has them."""

    objects: list[SceneObject]
    rows: np.ndarray | None = None


class Annotator(Protocol):
    """Where objects come from. `name` is noted in every JSON; `features`: it gives rows."""

    name: str
    features: bool

    def __call__(self, samples: Sequence[Sample]) -> Sequence[Annotated | BadImage | None]:
        """For each sample; None where nothing is known of it, BadImage where its image cannot be read."""


@dataclass
class Counts:
    """What became of the samples: how many have objects and summaries now, how many the annotations do not know."""

    samples: int = 0
    objects: int = 0
    summaries: int = 0
    unmatched: int = 0
    damaged: list[dict[str, str]] = field(default_factory=list)
    """shard, key, reason of the samples that were passed on as they are."""
    lost: list[dict[str, str]] = field(default_factory=list)
    """The same of what cannot be read of the tars."""


def enrich(
    source: Source,
    out: Path,
    annotator: Annotator | None,
    summary: str | None,
    *,
    replace: bool = False,
    advance: Callable[[], object] = lambda: None,
) -> Counts:
    """Write the samples of `source` into `out`, which must not exist or be empty, with what they lack.

    `summary` is one of SUMMARIES. What a sample has is kept, unless `replace`. `advance` is called once a sample.
    Raises UserError where there is no sample, or `out` is in the way.
    """
    if not source.samples:
        raise UserError("nothing to enrich: these shards hold no samples")
    counts = Counts()
    options = PackOptions(max(source.lengths), shard_bytes=1 << 60, shuffle_seed=None)
    with unfinished(out) as partial:
        writer = ShardWriter(partial, Listing("webdataset", classnames=_classnames(source)), options)
        for number in range(len(source.shards)):
            index = source.index(number)
            counts.lost += [_note(index, key, reason) for key, reason in index.problems]
            samples = _read(index)
            while some := list(islice(samples, AT_ONCE)):
                _annotate(some, annotator, replace, counts)
                for sample in some:
                    _summarize(sample, summary, replace)
                    _count(sample, index, counts)
                    writer.add(sample.key, sample.members)
                    advance()
            writer.cut()  # keys may come again in another tar, but not in the same one
        writer.finish()
        write_lines(partial / "damaged.jsonl", [*counts.lost, *counts.damaged])
    return counts


def _read(index: ShardIndex) -> Iterator[Sample]:
    with open(index.path, "rb") as tar:
        for row in range(len(index)):
            members = {name: _bytes(tar.fileno(), index, place) for name, place in index.members(row).items()}
            sample = Sample(index.key(row), members)
            try:
                sample.told = read_json(members["json"]) if "json" in members else {"key": sample.key}
            except ValueError as error:
                sample.wrong.append(f".json: {error}")
                sample.sealed = True
            yield sample


def _bytes(fd: int, index: ShardIndex, place: tuple[int, int]) -> bytes:
    offset, size = place
    data = b""
    while len(data) < size:
        part = os.pread(fd, size - len(data), offset + len(data))
        if not part:
            raise UserError(f"shard {index.path} ends before byte {offset + size}, which its index names: restore it")
        data += part
    return data


def _annotate(samples: list[Sample], annotator: Annotator | None, replace: bool, counts: Counts) -> None:
    """Give the samples what they lack of objects and rows."""
    if annotator is None:
        return
    asked = [s for s in samples if not s.sealed and (replace or _lacks(s, annotator))]
    for sample, found in zip(asked, annotator(asked) if asked else []):
        if found is None:
            counts.unmatched += 1
        elif isinstance(found, BadImage):
            sample.wrong.append(str(found))
        else:
            if replace or "objects" not in sample.told:
                sample.tell(objects=[o.record() for o in found.objects], detector=annotator.name)
            if found.rows is not None and (replace or roi.MEMBER not in sample.members):
                sample.members[roi.MEMBER] = roi.rows_bytes(found.rows)


def _lacks(sample: Sample, annotator: Annotator) -> bool:
    return "objects" not in sample.told or (annotator.features and roi.MEMBER not in sample.members)


def _summarize(sample: Sample, summary: str | None, replace: bool) -> None:
    """Give the sample summaries of its captions, where it has any."""
    if summary is None or sample.sealed or (SUMMARY in sample.members and not replace):
        return
    try:
        captions = read_captions(sample.members.get("txt", b""))
    except UnicodeDecodeError as error:
        sample.wrong.append(f".txt is not UTF-8 (byte {error.start})")
        return
    if captions:
        sample.members[SUMMARY] = caption_lines(list(dict.fromkeys(SUMMARIES[summary](captions))))
        sample.tell(summary_model=summary)


def _count(sample: Sample, index: ShardIndex, counts: Counts) -> None:
    counts.samples += 1
    counts.objects += bool(sample.told.get("objects"))
    counts.summaries += SUMMARY in sample.members
    counts.damaged += [_note(index, sample.key, reason) for reason in sample.wrong]


def _note(index: ShardIndex, key: str, reason: str) -> dict[str, str]:
    return {"shard": str(index.path), "key": key, "reason": reason}


def _classnames(source: Source) -> list[str]:
    """Those beside the shards, where these are of one folder."""
    folders = {path.parent for path in source.shards}
    names = folders.pop() / "classnames.txt" if len(folders) == 1 else None
    return names.read_text().splitlines() if names and names.is_file() else []
