"""search a collection by text, image, id or key

Example: python -m index search collections/flickr --text "two dogs on the beach" -k 5 --html hits.html
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from index.search.opened import Index


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("collection", type=Path, help="folder of the collection")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", help="words")
    query.add_argument("--image", type=Path, help="an image file")
    query.add_argument("--id", type=int, help="an image of the collection, by id")
    query.add_argument("--key", help="an image of the collection, by key")
    parser.add_argument("-k", type=int, default=10, help="hits (default 10)")
    parser.add_argument("--filter", help='conditions as JSON: {"label": 3} or {"label": {"in": [3, 5]}}')
    parser.add_argument("--encoder", type=Path, help="checkpoint (default: the one it was embedded with)")
    parser.add_argument("--version", help="search this version (default: the published one)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with pictures")


def run(args: argparse.Namespace) -> int:
    from index import open_index
    from index.search import show

    index = open_index(args.collection, version=args.version, encoder=args.encoder)
    if args.encoder is not None:
        index.encoder  # noqa: B018 -- a wrong one is refused even where it is not needed
    query, title = _query(args, index)
    hits = index.search(query, args.k, _filter(args.filter))
    scores, items = hits.scores[0].tolist(), index.items(hits.ids[0])
    print(show.table(scores, items))
    if args.html:
        subtitle = f"{args.collection}, version {index.manifest.version}, {len(index)} images"
        thumbs = [index.thumbnail(item["id"]) for item in items]
        args.html.write_text(show.page(title, subtitle, scores, items, thumbs), encoding="utf-8", errors="replace")
        print(f"page: {args.html}")
    return 0


def _query(args: argparse.Namespace, index: Index) -> tuple[Any, str]:
    if args.text is not None:
        return args.text, args.text
    if args.image is not None:
        return args.image, args.image.name
    id = index.id_of_key(args.key) if args.key is not None else args.id
    return index.vectors(index.rows_of([id])), f"like image {id}"


def _filter(text: str | None) -> Any:
    from pretrain.errors import UserError

    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"--filter {text!r} is not JSON ({error}); write it like '{{\"label\": 3}}'") from error
