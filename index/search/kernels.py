"""The fast float32 pass over a bank on a CPU: faiss, told when to use BLAS.

faiss has two ways, a scan and blocks through BLAS, and takes BLAS only above 128,000 = queries × dim, far too
late (200k × 256, one thread, queries per CPU second, faiss 1.15):

| queries | scan | BLAS | torch, one product + topk |
| 1       | 135  | 57   | 57                        |
| 3       | 122  | 108  | 79                        |
| 4       | 136  | 293  | 179                       |
| 16      | 123  | 505  | 361                       |
| 256     | 136  | 986  | 666                       |

`distance_compute_blas_threshold` is a global of the process: it is set for the length of one call, under a
lock, and put back (so searches of several threads take turns). Another thread that calls faiss just then gets
the other way, so its scores may differ in the last bit; nothing else of it changes.

faiss's thread count belongs to the calling thread. Fewer than 8 queries run on one thread (a team costs more
than it brings); more use what the caller set, at most SLURM_CPUS_PER_TASK. Never fork after a search: faiss's
thread team does not survive it, and the child hangs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable

import numpy as np

BLAS_QUERIES = 4  # from here on BLAS
TEAM_QUERIES = 8  # from here on several threads

_threshold_lock = threading.Lock()


def best(queries: np.ndarray, runs: Iterable[tuple[int, np.ndarray]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores, ids), each (Q, count): the best `count` rows by float32 products, in no stated order.

    queries: (Q, D) float32, Q ≥ 1; runs: (first id, rows float32), together at least `count` rows. Ties and
    last bits may fall either way.
    """
    import faiss

    found: tuple[np.ndarray, np.ndarray] | None = None
    with _threshold_lock:
        threshold, threads = faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads()
        faiss.cvar.distance_compute_blas_threshold = 0 if len(queries) >= BLAS_QUERIES else 2**31 - 1
        faiss.omp_set_num_threads(_team(len(queries), threads))
        try:
            for start, run in runs:
                scores, ids = faiss.knn(queries, run, min(count, len(run)), metric=faiss.METRIC_INNER_PRODUCT)
                new = scores, (ids + start if start else ids)
                found = new if found is None else _merge(found, new, count)
        finally:
            faiss.cvar.distance_compute_blas_threshold = threshold
            faiss.omp_set_num_threads(threads)
    assert found is not None  # count ≥ 1 rows were promised
    return found


def _team(queries: int, allowed: int) -> int:
    if queries < TEAM_QUERIES:
        return 1
    return max(1, min(allowed, int(os.environ.get("SLURM_CPUS_PER_TASK") or allowed)))


def _merge(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], count: int
) -> tuple[np.ndarray, np.ndarray]:
    scores, ids = (np.concatenate(pair, axis=1) for pair in zip(a, b))
    if scores.shape[1] <= count:
        return scores, ids
    places = np.argpartition(scores, -count, axis=1)[:, -count:]
    return np.take_along_axis(scores, places, 1), np.take_along_axis(ids, places, 1)
