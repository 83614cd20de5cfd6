"""Keyed bijections of range(n) without tables, vectorised: every row has its own n and its own key.

A Feistel network on an a-by-b grid hardly larger than n, with modular addition so that the sides need not
be equal or powers of two, walking on from the cells outside (Black & Rogaway, "Ciphers with Arbitrary
Finite Domains", CT-RSA 2002). The grid exceeds n by less than a side, so few rows walk. Sixteen rounds:
with ten, the permutations of five places were visibly uneven (tests/pretrain/test_order.py looks).

It shuffles; it hides nothing.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 16  # each half of the state in turn

_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_27, _30, _31 = np.uint64(27), np.uint64(30), np.uint64(31)


def keyed_hash(keys: np.ndarray, words: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer of key + word * golden ratio (Steele et al., OOPSLA 2014); uint64 in and out."""
    x = keys + words * _GOLDEN
    x = (x ^ (x >> _30)) * _MIX_1
    x = (x ^ (x >> _27)) * _MIX_2
    return x ^ (x >> _31)


def permute(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray, *, inverse: bool = False) -> np.ndarray:
    """Row by row the image of a place under the bijection of range(size) that the key names.

    places, sizes (b,) int64, 0 <= place < size < 2**62; keys (b,) uint64. `inverse` undoes it. Returns int64.
    """
    sizes = sizes.astype(np.uint64)
    a = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64)
    a += a & np.uint64(1)  # an even side reaches odd permutations too
    b = (sizes + a - np.uint64(1)) // a
    images = _network(places.astype(np.uint64), a, b, keys, inverse)
    while (outside := np.flatnonzero(images >= sizes)).size:
        images[outside] = _network(images[outside], a[outside], b[outside], keys[outside], inverse)
    return images.astype(np.int64)


def _network(cells: np.ndarray, a: np.ndarray, b: np.ndarray, keys: np.ndarray, inverse: bool) -> np.ndarray:
    """One pass over the cells of the a-by-b grid; all uint64."""
    halves, sizes = [cells // b, cells % b], (a, b)
    for r in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
        moved, other = r % 2, 1 - r % 2
        shift = keyed_hash(keys, halves[other] + np.uint64(r << 32)) % sizes[moved]
        halves[moved] = (halves[moved] + (sizes[moved] - shift if inverse else shift)) % sizes[moved]
    return halves[0] * b + halves[1]
