"""From the members of a tar to its samples: webdataset's key rule, and what becomes of the samples beside
damage.

A sample is a run of consecutive members of one key. The key is the name up to the first dot of its last part,
the extension everything after it, lower-cased (`key.seg.png` -> ``seg.png``). Passed over as webdataset does:
names without a dot, and ``__name__`` (shard metadata). Unlike there, hidden files (macOS's ``._x.jpg``) are
no samples.

Nothing else is dropped silently. Each of these is recorded with its key:
- the same key again later in the shard: the first is kept (it is also what members of a sample that do not
  stand together look like: make the tar from sorted names);
- the same extension twice in a sample: the first is kept;
- a sample at the edge of a damaged region that lacks an extension which this shard's samples commonly have:
  dropped, since its missing half lay in the damage.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from pretrain.shards.tarwalk import Gap, Member

NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
METADATA = re.compile(r"__[^/]*__($|/)")

Parts = dict[str, tuple[int, int]]  # extension -> (offset, size) in the tar
Problem = tuple[str, str]  # (key, or "" for the shard; what was passed over and why)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-cased extension of a member's name; None when it belongs to no sample."""
    found = NAME.match(name)
    if not found or found[1].endswith("/") or METADATA.match(name):
        return None
    return found[1], found[2].lower()


@dataclass
class Samples:
    """Samples in file order: keys[i] has parts[i]."""

    keys: list[str] = field(default_factory=list)
    parts: list[Parts] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


class _Grouper:
    def __init__(self) -> None:
        self.samples = Samples()
        self.seen: set[str] = set()
        self.edges: set[int] = set()  # samples that touch a gap
        self.broken: set[str] = set()  # keys with a member known to be lost
        self.key: str | None = None  # of the run of members being read
        self.parts: Parts | None = None  # where they go; None when the run is a repeat
        self.after_gap = False

    def add(self, member: Member) -> None:
        named = split_name(member.name)
        if named is None:
            return
        key, extension = named
        if key != self.key:
            self._open(key)
        if self.after_gap and self.parts is not None:
            self.edges.add(len(self.samples.keys) - 1)
        self.after_gap = False
        if self.parts is None:
            return
        if extension in self.parts:
            self.samples.problems.append((key, f"a second .{extension} at byte {member.offset}: the first is kept"))
        else:
            self.parts[extension] = (member.offset, member.size)

    def _open(self, key: str) -> None:
        self.key = key
        if key in self.seen:
            self.parts = None
            reason = (
                "the key comes again: the first is kept "
                "(a sample's members must stand together: make the tar from sorted names)"
            )
            self.samples.problems.append((key, reason))
            return
        self.seen.add(key)
        self.parts = {}
        self.samples.keys.append(key)
        self.samples.parts.append(self.parts)

    def gap(self, gap: Gap) -> None:
        named = split_name(gap.name) if gap.name else None
        key = named[0] if named else ""
        if key:
            self.broken.add(key)
        where = f"bytes {gap.start} to {gap.stop} passed over: " if gap.stop > gap.start else ""
        self.samples.problems.append((key, where + gap.reason))
        if self.parts is not None:
            self.edges.add(len(self.samples.keys) - 1)
        self.after_gap = True

    def finish(self) -> Samples:
        done = self.samples
        if not self.edges and not self.broken:
            return done
        common = _common_extensions(done.parts)
        drop = {}
        for i in sorted(self.edges):
            if missing := common - done.parts[i].keys():
                drop[i] = f"dropped: its .{', .'.join(sorted(missing))} lay in the damage"
        drop |= {i: "dropped: a member of it is lost" for i, key in enumerate(done.keys) if key in self.broken}
        done.problems += [(done.keys[i], reason) for i, reason in drop.items()]
        kept = [i for i in range(len(done.keys)) if i not in drop]
        return Samples([done.keys[i] for i in kept], [done.parts[i] for i in kept], done.problems)


def _common_extensions(parts: list[Parts]) -> frozenset[str]:
    """The set of extensions most samples have; of equally common ones the largest."""
    counts = Counter(frozenset(p) for p in parts)
    return max(counts, key=lambda s: (counts[s], len(s), sorted(s)), default=frozenset())


def group(found: Iterable[Member | Gap]) -> Samples:
    """Samples of a walk over one tar."""
    grouper = _Grouper()
    for item in found:
        if isinstance(item, Member):
            grouper.add(item)
        else:
            grouper.gap(item)
    return grouper.finish()
