"""Endless lines of keyed permutations, cut into chunks none of which holds a thing twice.

A line over n things is round after round, each round every thing once in an order of its own. Its chunks, m
wide, do not fit the rounds: one can hold the last t things of a round and the first m - t of the next. There
the next round is mended: those of its first m - t things that the chunk has already are swapped with the
nearest things behind them that it has not. Such are found among the first m places (of these at most t hold
the chunk's t things), so a mend moves places below m alone, which are never a round's end where n >= 2m - 1:
any chunk is worked out without those before it, and a swap loses and doubles nothing within its round.

For m <= n < 2m - 1 ends and beginnings overlap and no such swap can be worked out alone. There the rounds
between two points where chunk and round begin together (m / gcd(n, m) rounds) share one permutation: m
neighbours of a repeated permutation of n >= m things are different. For n < m things must repeat, and do so
as evenly as they can: by the same rule.
"""

from __future__ import annotations

import numpy as np

from pretrain.order.permutation import keyed_hash, permute


def chunks(
    numbers: np.ndarray, sizes: np.ndarray, width: int, keys: np.ndarray, columns: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Chunk `numbers[i]` of line i over range(sizes[i]): the things and their rounds, (c, columns) int64 each.

    numbers, sizes (c,) int64, keys (c,) uint64. `columns` are the places of the chunk that are wanted; None is
    all `width`.
    """
    columns = np.arange(width) if columns is None else columns
    rounds, places = np.divmod(numbers[:, None] * width + columns, sizes[:, None])
    things = _shuffled(places, rounds, sizes, width, keys)
    at = np.flatnonzero(_is_mended(numbers, sizes, width))
    if at.size:
        latest = (numbers[at] * width + width - 1) // sizes[at]
        heads = _mended_heads(latest, sizes[at], width, keys[at])
        line, column = np.nonzero((rounds[at] == latest[:, None]) & (places[at] < width))
        things[at[line], column] = heads[line, places[at[line], column]]
    return things, rounds


def _shuffled(places: np.ndarray, rounds: np.ndarray, sizes: np.ndarray, width: int, keys: np.ndarray) -> np.ndarray:
    """(c, b) things at places of rounds, before any mend."""
    shared = np.where(sizes >= 2 * width - 1, 1, width // np.gcd(sizes, width))  # rounds of one permutation
    keys = keyed_hash(np.broadcast_to(keys[:, None], places.shape), (rounds // shared[:, None]).astype(np.uint64))
    sizes = np.broadcast_to(sizes[:, None], places.shape)
    return permute(places.ravel(), sizes.ravel(), keys.ravel()).reshape(places.shape)


def _is_mended(numbers: np.ndarray, sizes: np.ndarray, width: int) -> np.ndarray:
    """(c,) whether a chunk holds any of the first `width` places of a round that begins inside a chunk."""
    latest, last = np.divmod(numbers * width + width - 1, sizes)
    return (sizes >= 2 * width - 1) & (last < 2 * width - 1) & (latest * sizes % width > 0)


def _mended_heads(rounds: np.ndarray, sizes: np.ndarray, width: int, keys: np.ndarray) -> np.ndarray:
    """(c, width) first things of rounds, such that those in the chunk of the round before repeat none of it."""
    columns = np.broadcast_to(np.arange(width), (len(rounds), width))
    taken = (width - rounds * sizes % width)[:, None]  # places of the head in the chunk that the rounds share
    heads = _shuffled(columns, np.broadcast_to(rounds[:, None], columns.shape), sizes, width, keys)
    ends = (sizes - width)[:, None] + columns
    tails = _shuffled(ends, np.broadcast_to(rounds[:, None] - 1, columns.shape), sizes, width, keys)
    line = np.arange(len(rounds))[:, None] * sizes.max()  # tells the lines' things apart
    seen = np.isin(line + heads, (line + tails)[columns >= taken])
    twice, free = seen & (columns < taken), ~seen & (columns >= taken)
    free &= np.cumsum(free, 1) <= twice.sum(1)[:, None]  # the first ones, as many as are needed
    heads[twice], heads[free] = heads[free], heads[twice]
    return heads
