"""The index: embeddings of shards, published as versions of a collection, and exact search in them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from index.search.opened import Index
    from pretrain.encoder import Encoder


def open_index(
    folder: str | os.PathLike[str],
    *,
    version: str | None = None,
    encoder: Encoder | str | os.PathLike[str] | None = None,
) -> Index:
    """Open a collection's published version (or `version`); `.search(vectors | images | texts, k)` in it.

    Texts and images need the encoder it was built with: the one at the path noted when embedding, unless
    given.
    """
    from index.search.opened import Index

    return Index(folder, version=version, encoder=encoder)
