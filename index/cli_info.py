"""say what a collection holds: counts, encoder, sizes, versions

Example: python -m index info collections/flickr
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from index.store.collection import Collection
    from index.store.manifest import Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("collection", type=Path, help="folder of the collection")
    parser.add_argument("--version", help="tell of this version (default: the published one, else the newest)")


def run(args: argparse.Namespace) -> int:
    from index.store.collection import Collection
    from pretrain.errors import UserError

    collection = Collection(args.collection)
    if not collection.versions():
        raise UserError(f"{args.collection} holds no version: make one with python -m index build")
    current = collection.current()
    manifest = collection.manifest(args.version or current or collection.versions()[-1])
    print("\n".join([*describe(manifest, current), *history(collection, current)]))
    return 0


def describe(m: Manifest, current: str | None) -> list[str]:
    """What one version holds, a line a fact."""
    state = "published" if m.version == current else "not published"
    size = sum(f["bytes"] for s in m.segments for f in s["files"])
    skipped = ", ".join(f"{n} {reason}" for reason, n in sorted(m.skipped.items()))
    return [
        f"version      {m.version}, {state}, built {m.created}",
        f"images       {m.rows} rows + {sum(m.skipped.values())} skipped = {m.members} members",
        *([f"skipped      {skipped}"] if skipped else []),
        f"captions     {m.texts}",
        f"vectors      {m.dim} wide, float16, unit length, {m.metric.replace('_', ' ')}",
        f"encoder      {m.fingerprint[:12]}, from {m.encoder.get('checkpoint') or 'a checkpoint not noted'}",
        f"on disk      {len(m.segments)} segments, {size / 2**20:.1f} MiB",
        f"tars         {sum(len(s['sources']) for s in m.segments)}",
    ]


def history(collection: Collection, current: str | None) -> list[str]:
    """A line a version, oldest first."""
    lines = ["versions"]
    for version in collection.versions():
        m = collection.manifest(version)
        mark = "  <- published" if version == current else ""
        lines.append(f"  {version}  {m.rows} rows, encoder {m.fingerprint[:12]}, on {m.parent or 'nothing'}{mark}")
    return lines
