"""Fast float32 passes over a bank that name more candidates than are asked for; `exact` decides among them.

On a CPU faiss, which has two ways: a scan, and blocks through BLAS. It takes BLAS only above 128,000 = queries × dim,
far too late (200k × 256, one thread, queries per CPU second, faiss 1.15):

| queries | scan | BLAS | torch, one product + topk |
| 1       | 135  | 57   | 57                        |
| 3       | 122  | 108  | 79                        |
| 4       | 136  | 293  | 179                       |
| 16      | 123  | 505  | 361                       |
| 256     | 136  | 986  | 666                       |

`distance_compute_blas_threshold` is a global of the process: it is set for the length of one call, under a lock, and
put back. Another thread that calls faiss just then gets the other way, so its scores may differ in the last bit;
nothing else of it changes.

faiss's thread count belongs to the calling thread. Fewer than 8 queries run on one thread (a team costs more than it
brings); more use what the caller set, at most SLURM_CPUS_PER_TASK. Never fork after a search: faiss's thread team
does not survive it, and the child hangs.

On a GPU torch: a product and a topk a block.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from index.search.bank import Bank

BLAS_QUERIES = 4  # from here on BLAS
TEAM_QUERIES = 8  # from here on several threads
CUDA_SCORES = 2**26  # scores held at once on a GPU: 256 MiB

_threshold_lock = threading.Lock()


def candidates(queries: Tensor, bank: Bank, count: int) -> tuple[Tensor, Tensor]:
    """(scores, ids), each (Q, count): the best `count` rows by float32 products, in no stated order, Q ≥ 1.

    `count` ≤ bank.rows. Ties and last bits may fall either way.
    """
    if bank.device.type == "cpu":
        return _faiss_pass(queries, bank, count)
    return _torch_pass(queries, bank, count)


def merge(best: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The best `count` of two lists of (scores, ids) a query."""
    if best is None:
        return new
    scores, ids = (torch.cat(pair, dim=1) for pair in zip(best, new))
    scores, place = scores.topk(min(count, scores.shape[1]), sorted=False)
    return scores, ids.gather(1, place)


def _torch_pass(queries: Tensor, bank: Bank, count: int) -> tuple[Tensor, Tensor]:
    best = None
    for start, block in bank.blocks(max(1024, CUDA_SCORES // len(queries))):
        top, ids = (queries @ block.T).topk(min(count, len(block)), sorted=False)
        best = merge(best, (top, ids + start), count)
    assert best is not None  # count ≥ 1 rows exist
    return best


def _faiss_pass(queries: Tensor, bank: Bank, count: int) -> tuple[Tensor, Tensor]:
    import faiss

    best = None
    with _blas(len(queries) >= BLAS_QUERIES), _threads(len(queries)):
        for start, run in bank.runs():
            top, ids = faiss.knn(
                queries.numpy(), run.numpy(), min(count, len(run)), metric=faiss.METRIC_INNER_PRODUCT
            )
            best = merge(best, (torch.from_numpy(top), torch.from_numpy(ids) + start), count)
    assert best is not None
    return best


@contextlib.contextmanager
def _blas(wanted: bool) -> Iterator[None]:
    import faiss

    with _threshold_lock:
        before = faiss.cvar.distance_compute_blas_threshold
        faiss.cvar.distance_compute_blas_threshold = 0 if wanted else 2**31 - 1
        try:
            yield
        finally:
            faiss.cvar.distance_compute_blas_threshold = before


@contextlib.contextmanager
def _threads(queries: int) -> Iterator[None]:
    import faiss

    before = faiss.omp_get_max_threads()
    allowed = min(before, int(os.environ.get("SLURM_CPUS_PER_TASK") or before))
    faiss.omp_set_num_threads(1 if queries < TEAM_QUERIES else max(1, allowed))
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
