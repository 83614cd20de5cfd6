"""`python -m index VERB`: embed shards, build a collection of them, publish it, search in it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pretrain import cli

DOC = "Shards and a checkpoint -> embeddings -> versions of a collection -> search."

VERBS = {
    "embed": "index.cli_embed",
    "build": "index.cli_build",
    "publish": "index.cli_publish",
    "search": "index.cli_search",
    "info": "index.cli_info",
}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main("index", DOC, VERBS, argv)


if __name__ == "__main__":
    sys.exit(main())
