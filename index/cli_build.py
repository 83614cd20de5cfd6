"""build a new version of a collection from embeddings

Example: python -m index build collections/flickr --from embeddings/flickr

Adds the tars that the published version does not hold yet. Nothing changes for readers until it is published.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("collection", type=Path, help="folder of the collection; made when it does not exist")
    parser.add_argument("--from", dest="embeddings", type=Path, required=True, help="what index embed --out wrote")
    parser.add_argument("--replace", action="store_true", help="hold these embeddings only, of whatever encoder")
    parser.add_argument("--partial", action="store_true", help="build although some tars are not embedded yet")


def run(args: argparse.Namespace) -> int:
    from index.store.build import build
    from index.store.collection import Collection

    built = build(Collection(args.collection), args.embeddings, replace=args.replace, partial=args.partial)
    m = built.manifest
    if m is None:
        print(f"nothing to add: {args.collection} holds all {built.known} tars already")
        return 0
    print(
        f"version {m.version} (built on {m.parent or 'nothing'}): {built.added} tars added, "
        f"{built.known} known; "
        f"{m.rows} rows + {sum(m.skipped.values())} skipped = {m.members} members\n"
        f"serve it: python -m index publish {args.collection}"
    )
    return 0
