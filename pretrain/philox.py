"""Random numbers without state: Philox4x32-10 in numpy, keyed by seed, epoch, source, sample and purpose.

Every crop, flip and caption choice is drawn here, so a number depends on what it is for and on nothing
else: not on the rank, the worker, the order of calls or the platform. Philox is counter-based (Salmon et
al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): the sample is the counter, seed and purpose
are the key, and a whole batch is one vectorised call. numpy's own `Philox` is the 4x64 form and makes one
stream an object: a thousand objects a batch.

It is not a generator for cryptography, and it draws no distributions: callers map uniforms to what they
need.
"""

from __future__ import annotations

import hashlib
import operator

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)
_ROUNDS = 10

MAX_ID = 1 << 48
MAX_SOURCE = 1 << 16
MAX_EPOCH = 1 << 32


def key(*parts: int | str) -> int:
    """A 64-bit key from named parts: BLAKE2b, the parts told apart, the same on every machine and Python."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        kind, text = ("s", part) if isinstance(part, str) else ("i", str(operator.index(part)))
        data = text.encode()
        digest.update(f"{kind}{len(data)}:".encode() + data)
    return int.from_bytes(digest.digest(), "little")


def philox(counter: np.ndarray, key64: int) -> np.ndarray:
    """Philox4x32-10 of `counter` under one 64-bit key; both (..., 4), 32-bit words in uint64."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    low, high = key64 & 0xFFFFFFFF, key64 >> 32
    for r in range(_ROUNDS):
        k0 = np.uint64((low + r * _WEYL[0]) & 0xFFFFFFFF)
        k1 = np.uint64((high + r * _WEYL[1]) & 0xFFFFFFFF)
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (second >> _WORD) ^ c1 ^ k0, second & _LOW
        c2, c3 = (first >> _WORD) ^ c3 ^ k1, first & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1)


def _counters(epoch, source, ids, blocks: int) -> np.ndarray:
    """(B, blocks, 4) counter words: id low, epoch, source and id high, number of the block of draws."""
    ids, epoch, source = np.broadcast_arrays(np.atleast_1d(np.asarray(ids, np.int64)), epoch, source)
    for name, values, limit in (
        ("id", ids, MAX_ID),
        ("epoch", epoch, MAX_EPOCH),
        ("source", source, MAX_SOURCE),
    ):
        if values.size and (values.min() < 0 or values.max() >= limit):
            raise ValueError(f"{name} must lie in [0, {limit}), got {values.min()} to {values.max()}")
    ids, epoch, source = (x.astype(np.uint64) for x in (ids, epoch, source))
    counter = np.empty((len(ids), blocks, 4), np.uint64)
    counter[..., 0] = (ids & _LOW)[:, None]
    counter[..., 1] = epoch[:, None]
    counter[..., 2] = ((source << np.uint64(16)) | (ids >> _WORD))[:, None]
    counter[..., 3] = np.arange(blocks, dtype=np.uint64)
    return counter


def uniforms(seed: int, epoch, source, ids, purpose: str, n: int) -> np.ndarray:
    """(B, n) float64 in [0, 1), 53 random bits each, row by row a function of the five keys alone.

    `ids` is (B,) below 2**48; `epoch` (below 2**32) and `source` (below 2**16) are (B,), or one integer for
    all rows. A larger `n` keeps the first draws as they were. Raises ValueError for a key out of range.
    """
    blocks = (n + 1) // 2
    words = philox(_counters(epoch, source, ids, blocks), key(seed, purpose))
    high, low = words[..., 0::2] >> np.uint64(5), words[..., 1::2] >> np.uint64(6)
    draws = (high.astype(np.float64) * 2.0**26 + low.astype(np.float64)) * 2.0**-53
    return draws.reshape(len(draws), 2 * blocks)[:, :n]
