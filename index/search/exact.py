"""Exact top-k by inner product, the same answer whatever the batch, the kernel or the device.

A float32 pass names a few candidates more than asked for (`kernels`); their products are taken again in float64,
rounded to float32 and sorted, equal scores by the lower row. The answer is certified where no row outside the
candidates can reach it: the worst candidate, plus the largest error a float32 product can have (γ_D of Higham,
Accuracy and Stability of Numerical Algorithms, §3.1), lies below the k-th score. Queries without that certificate
(rows equal or nearly so around the k-th place) are asked again with many more candidates, and what is still open
gets a whole float64 pass.

Memory does not grow with the bank: a block of rows, or one of scores, at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from index.errors import BadInput
from index.search.bank import Bank, Rows, as_bank, check_matrix
from index.search.kernels import candidates

QUERY_ROWS = 1024  # queries a pass
EXACT_QUERY_ROWS = 256  # queries of a float64 pass: 256 × 16,384 scores are 32 MiB
MORE_CANDIDATES = 16  # times the first number, at the second asking
RESCORE_ELEMENTS = 2**23  # float64 numbers gathered at once: 64 MiB


def exact_topk(queries: Rows, bank: Rows | Bank, k: int, *, device: str | torch.device = "auto"):
    """The `k` rows of `bank` with the largest inner product for each query, best first.

    queries: (Q, D) floats, array or tensor; bank: (N, D), array, tensor, or a `Bank` (several arrays, checked once).
    Gives (scores (Q, min(k, N)) float32, ids (Q, min(k, N)) int64), arrays for an array of queries, tensors on the
    queries' device for a tensor. Equal scores: the lower id first. `device`: "auto" searches where the bank is.
    For cosine similarity both sides must be unit rows.

    Raises `BadInput` (a ValueError): k < 1, shapes or widths that do not fit, NaN or infinity on either side.
    """
    bank = _on(as_bank(bank), device)
    asked = _check_queries(queries, bank, k)
    k = min(int(k), bank.rows)
    found = [_search(rows, bank, k) for rows in asked.split(QUERY_ROWS)] if len(asked) and k else []
    scores = torch.cat([s for s, _ in found]) if found else torch.empty(len(asked), k)
    ids = torch.cat([i for _, i in found]) if found else torch.empty(len(asked), k, dtype=torch.int64)
    if isinstance(queries, Tensor):
        return scores.to(queries.device), ids.to(queries.device)
    return scores.cpu().numpy(), ids.cpu().numpy()


def _on(bank: Bank, device: str | torch.device) -> Bank:
    if device == "auto" or torch.device(device) == bank.device:
        return bank
    if torch.device(device).type == bank.device.type == "cuda" and torch.device(device).index is None:
        return bank
    return Bank([torch.cat([block for _, block in bank.blocks()]).to(device)], bank.largest_norm)


def _check_queries(queries: Rows, bank: Bank, k: int) -> Tensor:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise BadInput(f"k must be a whole number of at least 1, got {k!r}")
    check_matrix(queries, "queries")
    if queries.shape[1] != bank.dim:
        raise BadInput(f"queries: width {queries.shape[1]}, but the bank's rows have width {bank.dim}")
    asked = queries.detach() if isinstance(queries, Tensor) else torch.from_numpy(np.array(queries))
    asked = asked.to(bank.device, torch.float32).contiguous()
    bad = (~torch.isfinite(asked.norm(dim=1) * bank.largest_norm)).nonzero()
    if len(bad):
        raise BadInput(f"queries: row {int(bad[0])} is not finite, or too large for float32 products")
    return asked


def _search(queries: Tensor, bank: Bank, k: int, *, again: bool = False) -> tuple[Tensor, Tensor]:
    count = k + (4 + k // 8) * (MORE_CANDIDATES if again else 1)
    if bank.rows <= 2 * count:
        return _whole_pass(queries, bank, k)
    rough, ids = candidates(queries, bank, count)
    scores, ids = _first(_rescore(queries, bank, ids), ids, k)
    reach = rough.amin(dim=1) + _largest_error(queries, bank)
    open_ = (reach >= scores[:, -1]).nonzero().squeeze(1)
    if len(open_):
        some = queries[open_]
        scores[open_], ids[open_] = (
            _whole_pass(some, bank, k) if again else _search(some, bank, k, again=True)
        )
    return scores, ids


def _largest_error(queries: Tensor, bank: Bank) -> Tensor:
    """Bound of |float32 product − true product|, and of rounding the true one, a query (Q,)."""
    unit = 2.0**-24 * (bank.dim + 2)
    if _rounds_inputs(bank.device):
        unit += 2.0**-7  # both factors may be cut to bfloat16 or TF32 first
    return queries.norm(dim=1) * bank.largest_norm * unit


def _rounds_inputs(device: torch.device) -> bool:
    try:
        if torch.get_float32_matmul_precision() != "highest":
            return True
        return device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # torch's old and new precision settings were mixed: be careful
        return True


def _rescore(queries: Tensor, bank: Bank, ids: Tensor) -> Tensor:
    """Products of each query with its candidates (Q, C), in float64, rounded to float32."""
    step = max(1, RESCORE_ELEMENTS // (ids.shape[1] * bank.dim))
    out = []
    for lo in range(0, len(queries), step):
        some = ids[lo : lo + step]
        rows = bank.take(some.reshape(-1)).double().view(*some.shape, bank.dim)
        out.append((rows * queries[lo : lo + step, None].double()).sum(-1).float())
    return torch.cat(out)


def _first(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best `k` in order: larger score first, then lower id."""
    ids, by_id = ids.sort(dim=1)
    scores, by_score = scores.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], ids.gather(1, by_score)[:, :k]


def _whole_pass(queries: Tensor, bank: Bank, k: int) -> tuple[Tensor, Tensor]:
    """Every row in float64, block by block; `queries` any number."""
    scores, ids = [], []
    for some in queries.split(EXACT_QUERY_ROWS):
        best: tuple[Tensor, Tensor] | None = None
        for start, block in bank.blocks():
            new = _first_of_block((some.double() @ block.double().T).float(), start, k)
            best = new if best is None else _first(*(torch.cat(pair, dim=1) for pair in zip(best, new)), k)
        assert best is not None  # rows ≥ k ≥ 1
        scores.append(best[0])
        ids.append(best[1])
    return torch.cat(scores), torch.cat(ids)


def _first_of_block(scores: Tensor, start: int, k: int) -> tuple[Tensor, Tensor]:
    """As `_first` for a whole block, which sorts k columns, not all."""
    k = min(k, scores.shape[1])
    edge = scores.topk(k).values[:, -1:]
    above, equal = scores > edge, scores == edge
    wanted = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    places = wanted.nonzero()[:, 1].view(-1, k)
    return _first(scores.gather(1, places), places + start, k)
