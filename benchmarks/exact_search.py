"""Exact search beside faiss and torch: queries per CPU second, one thread.

    python -m benchmarks.exact_search [--rows 200000] [--dim 256] [--json FILE]

Bars: at batch 64 at least 4× faiss as it comes; at any batch at least 0.95× the best of faiss (as it comes,
and with the BLAS threshold set either way) and torch (one product + topk). Our figure includes everything
`exact_topk` does: checks, float64 re-scoring of the candidates, the certificate.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
import torch

from benchmarks.common import measure, parser, report
from index.search import exact_topk

BATCHES = (1, 4, 16, 64, 256)
K = 10


def unit_rows(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    x = rng.standard_normal((rows, dim), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def faiss_search(queries: np.ndarray, bank: np.ndarray, threshold: int) -> None:
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = threshold
    faiss.knn(queries, bank, K, metric=faiss.METRIC_INNER_PRODUCT)
    faiss.cvar.distance_compute_blas_threshold = before


def contenders(queries: np.ndarray, bank: np.ndarray) -> dict:
    default = faiss.cvar.distance_compute_blas_threshold
    q, b = torch.from_numpy(queries), torch.from_numpy(bank)
    return {  # in this order, since whoever runs after torch finds cold caches
        "torch": lambda: torch.topk(q @ b.T, K),
        "faiss": lambda: faiss_search(queries, bank, default),
        "polyview": lambda: exact_topk(queries, bank, K),
        "faiss scan": lambda: faiss_search(queries, bank, 2**31 - 1),
        "faiss BLAS": lambda: faiss_search(queries, bank, 0),
    }


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--rows", type=int, default=200_000)
    p.add_argument("--dim", type=int, default=256)
    args = p.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(0)
    bank, queries = unit_rows(rng, args.rows, args.dim), unit_rows(rng, max(BATCHES), args.dim)
    rows = []
    for batch in BATCHES:
        seconds = measure(contenders(queries[:batch], bank), args.rounds)
        rate = {name: batch / s for name, s in seconds.items()}
        best = max(r for name, r in rate.items() if name != "polyview")
        rows.append(
            {"batch": batch}
            | {name: round(r) for name, r in rate.items()}
            | {"ours/faiss": rate["polyview"] / rate["faiss"], "bar": "4" if batch == 64 else "-"}
            | {"ours/best": rate["polyview"] / best, "bar of best": 0.95}
        )
    report(f"exact search, {args.rows} × {args.dim}, k = {K}, queries per CPU second, 1 thread", rows, args)


if __name__ == "__main__":
    main()
