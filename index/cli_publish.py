"""check every byte of a version and make it the one that is served

Example: python -m index publish collections/flickr

Publishing an earlier version goes back to it. A version built on another one than the current is refused.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("collection", type=Path, help="folder of the collection")
    parser.add_argument("--version", help="which one (default: the newest)")


def run(args: argparse.Namespace) -> int:
    from index.store.collection import Collection

    before, now = Collection(args.collection).publish(args.version)
    print(f"{args.collection} serves version {now}" + (f" (before: {before})" if before not in (None, now) else ""))
    return 0
