"""Vectors laid out on a plane for the eye: t-SNE where there are enough of them, else the two principal axes.

The layout keeps who is near whom and little else; no figure is computed from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FEWEST_FOR_TSNE = 30
MOST_CLUSTERS = 10


def layout(vectors: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, str]:
    """Places (n, 2) in 0..1 of unit rows (n, D), and how they came about: "t-SNE" or "PCA".

    Vectors that are all equal lie on one point.
    """
    if len(vectors) < 3 or np.ptp(vectors, axis=0).max() < 1e-6:
        return np.full((len(vectors), 2), 0.5), "PCA"
    if len(vectors) < FEWEST_FOR_TSNE:
        return _fill(_axes(vectors)), "PCA"
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(vectors) - 1) / 3)
    places = TSNE(2, perplexity=perplexity, init=_start(vectors), random_state=seed).fit_transform(vectors)
    return _fill(places), "t-SNE"


def _axes(vectors: np.ndarray) -> np.ndarray:
    """(n, 2) coordinates on the two principal axes."""
    centred = vectors.astype(np.float64) - vectors.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    axes = np.zeros((len(vectors), 2))
    axes[:, : min(2, len(s))] = u[:, :2] * s[:2]
    return axes


def _start(vectors: np.ndarray) -> np.ndarray:
    """The principal axes at the small scale t-SNE starts from: deterministic, and keeps the coarse order."""
    axes = _axes(vectors)
    return (axes / max(axes[:, 0].std(), 1e-12) * 1e-4).astype(np.float32)


def _fill(places: np.ndarray) -> np.ndarray:
    low, span = places.min(0), np.ptp(places, axis=0)
    return (places - low) / np.where(span > 0, span, 1)


def clusters(vectors: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """(n,) cluster of each unit row by k-means, for colours where there are no classes; numbered by size."""
    from sklearn.cluster import KMeans

    distinct = len(np.unique(vectors.round(5), axis=0))
    k = max(1, min(MOST_CLUSTERS, len(vectors) // 10, distinct))
    found = KMeans(k, n_init=4, random_state=seed).fit_predict(vectors)
    order = np.argsort(-np.bincount(found, minlength=k), kind="stable")
    return np.argsort(order)[found]


def as_picture(
    vectors: np.ndarray, kinds: np.ndarray, names: list[str], thumbnails: list, *, by: str, seed: int = 0
) -> dict[str, Any]:
    """The map as the report reads it. `kinds` (n,): class or cluster; `thumbnails`: data URIs or None."""
    places, method = layout(vectors, seed=seed)
    points = [[round(float(x), 4), round(float(y), 4), int(k), t] for (x, y), k, t in zip(places, kinds, thumbnails)]
    return {"method": method, "by": by, "classes": names, "points": points}
