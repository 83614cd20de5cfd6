"""Exact top-k by inner product, the same answer whatever the batch, the kernel or the device.

A float32 pass names a few candidates more than asked for; their products are taken again in float64, rounded
to float32 and sorted, equal scores by the lower row. The answer is certified where no row outside the
candidates can reach it: the worst candidate, plus the largest error a float32 product can have (γ_D of
Higham, Accuracy and Stability of Numerical Algorithms, §3.1), lies below the k-th score. Queries without that
certificate (rows equal or nearly so around the k-th place) are asked again with many more candidates, and
what is still open gets a whole float64 pass.

Memory does not grow with the bank: a block of rows, or one of scores, at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from index.errors import BadInput
from index.search.bank import AnyBank, check_matrix, remembered

if TYPE_CHECKING:
    import torch

QUERY_ROWS = 1024  # queries a pass
WHOLE_PASS_ROWS = 256  # queries of a float64 pass: 256 × 16,384 scores are 32 MiB
MORE_CANDIDATES = 16  # times the first number, at the second asking
LARGEST = 1e37  # product of norms: beyond it float32 sums overflow

Pair = tuple[np.ndarray, np.ndarray]


def exact_topk(
    queries: np.ndarray | torch.Tensor,
    bank: np.ndarray | torch.Tensor | AnyBank,
    k: int,
    *,
    device: str | torch.device = "auto",
) -> tuple[Any, Any]:
    """The `k` rows of `bank` with the largest inner product for each query, best first.

    queries: (Q, D) floats, array or tensor; bank: (N, D), array, tensor, or a `Bank` (several arrays, checked
    once). Gives (scores (Q, min(k, N)) float32, ids (Q, min(k, N)) int64): arrays for an array of queries,
    tensors on the queries' device for a tensor. Equal scores: the lower id first. `device`: "auto" searches
    where the bank is. For cosine similarity both sides must be unit rows.

    Raises `BadInput` (a ValueError): k < 1, shapes or widths that do not fit, NaN or infinity on either side.
    """
    rows = _bank(bank, device)
    asked, norms = _queries(queries, rows, k)
    k = min(int(k), rows.rows)
    scores = np.empty((len(asked), k), np.float32)
    ids = np.empty((len(asked), k), np.int64)
    for lo in range(0, len(asked) if k else 0, QUERY_ROWS):
        part = slice(lo, lo + QUERY_ROWS)
        scores[part], ids[part] = _search(asked[part], norms[part], rows, k)
    if isinstance(queries, np.ndarray):
        return scores, ids
    import torch

    return torch.from_numpy(scores).to(queries.device), torch.from_numpy(ids).to(queries.device)


def _bank(bank: Any, device: Any) -> AnyBank:
    """What was given, as a bank that lies where the search is to be."""
    if isinstance(bank, AnyBank):
        return bank
    if isinstance(bank, np.ndarray) and str(device) in ("auto", "cpu"):
        return remembered(bank)
    if not hasattr(bank, "device"):
        raise BadInput(f"bank: expected an array or a tensor of shape (rows, dim), got {type(bank).__name__}")
    return _tensor_bank(bank, device)


def _tensor_bank(bank: Any, device: Any) -> AnyBank:
    import torch

    from index.search.device import DeviceBank

    rows = torch.as_tensor(bank).detach()
    rows = rows if device == "auto" else rows.to(device)
    if rows.device.type == "cpu" and rows.dtype != torch.bfloat16:
        return remembered(rows.numpy(), owner=bank)
    return DeviceBank(rows)


def _queries(queries: Any, bank: AnyBank, k: int) -> Pair:
    """The queries as float32 rows on the host, and their norms; checked."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise BadInput(f"k must be a whole number of at least 1, got {k!r}")
    if hasattr(queries, "detach"):
        queries = queries.detach().cpu().float().numpy() if queries.is_floating_point() else queries.cpu().numpy()
    check_matrix(queries, "queries")
    if queries.shape[1] != bank.dim:
        raise BadInput(f"queries: width {queries.shape[1]}, but the bank's rows have width {bank.dim}")
    asked = np.ascontiguousarray(queries, np.float32)
    norms = np.sqrt(np.einsum("qd,qd->q", asked, asked))
    fits = norms < LARGEST / max(bank.largest_norm, 1.0)  # NaN does not
    if not fits.all():
        row = int(fits.argmin())
        raise BadInput(f"queries: row {row} is not finite, or too large for float32 products")
    return asked, norms


def _search(queries: np.ndarray, norms: np.ndarray, bank: AnyBank, k: int, *, again: bool = False) -> Pair:
    count = k + (4 + k // 8) * (MORE_CANDIDATES if again else 1)
    if bank.rows <= 2 * count:
        return _whole_pass(queries, bank, k)
    rough, ids = bank.candidates(queries, count)
    scores, ids = _first(bank.rescore(queries, ids), ids, k)
    error = norms * (bank.largest_norm * (bank.unit * (bank.dim + 2) + bank.extra))
    open_ = rough.min(axis=1) + error >= scores[:, -1]
    if open_.any():
        some = queries[open_]
        more = _whole_pass(some, bank, k) if again else _search(some, norms[open_], bank, k, again=True)
        scores[open_], ids[open_] = more
    return scores, ids


def _first(scores: np.ndarray, ids: np.ndarray, k: int) -> Pair:
    """The best `k` in order: larger score first, then lower id."""
    order = np.lexsort((ids, -scores))[:, :k]
    row = np.arange(len(order))[:, None]
    return scores[row, order], ids[row, order]


def _whole_pass(queries: np.ndarray, bank: AnyBank, k: int) -> Pair:
    """Every row in float64, block by block; `queries` any number."""
    parts = []
    for lo in range(0, len(queries), WHOLE_PASS_ROWS):
        found: Pair | None = None
        for start, scores in bank.all_scores(queries[lo : lo + WHOLE_PASS_ROWS]):
            new = _first_of_block(scores, start, k)
            found = new if found is None else _first(*_joined(found, new), k)
        assert found is not None  # rows ≥ k ≥ 1
        parts.append(found)
    return np.concatenate([s for s, _ in parts]), np.concatenate([i for _, i in parts])


def _joined(a: Pair, b: Pair) -> Pair:
    return np.concatenate([a[0], b[0]], axis=1), np.concatenate([a[1], b[1]], axis=1)


def _first_of_block(scores: np.ndarray, start: int, k: int) -> Pair:
    """As `_first` of a whole block, sorting k columns instead of all."""
    k = min(k, scores.shape[1])
    edge = np.partition(scores, -k, axis=1)[:, -k, None]
    above, equal = scores > edge, scores == edge
    wanted = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdims=True)))
    places = wanted.nonzero()[1].reshape(-1, k)
    return _first(np.take_along_axis(scores, places, 1), places + start, k)
