"""Image-text retrieval in the five-caption convention of Flickr and COCO (Karpathy's splits).

`image_retrieval_recall@K`: a caption's own image is among the K nearest images. `text_retrieval_recall@K`:
any of an image's captions is among the K nearest captions (not all of them). Both as CLIP_benchmark and
open_clip count, with a stated rule for ties: rank = 1 + strictly nearer + equally near with a lower number.
No Q × N matrix is ever held.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from downstream.intervals import bootstrap, weighted_median, widen_certain
from pretrain.distributed.evaluation import gather_rows, shard_rows
from pretrain.distributed.groups import Group
from pretrain.objectives.functional import contrastive_ranks

AT = (1, 5, 10)


@dataclass
class Ranks:
    """Where the right partner stood, from 1."""

    image: np.ndarray  # (Q,) for each caption: the place of its image
    text: np.ndarray  # (M,) for each image that has captions: the place of the best of them
    owner: np.ndarray  # (Q,) each caption's image, numbered among all N
    images: int  # N, those without captions included: they are there to be mistaken for


def rank(images: np.ndarray, texts: np.ndarray, owner: np.ndarray, *, device="cpu", group: Group = None) -> Ranks:
    """Ranks of all captions and images, on every rank; each rank counts for a share of the queries.

    `images` (N, D) and `texts` (Q, D) unit rows, `owner` (Q,) the image of each caption. All equal on every
    rank.
    """
    asked, query = np.unique(owner, return_inverse=True)
    captions = np.arange(len(texts))
    by_text = _ranks(texts, images, np.stack([captions, owner], 1), device, group)
    by_image = _ranks(images[asked], texts, np.stack([query, captions], 1), device, group)
    return Ranks(by_text, by_image, owner, len(images))


def _ranks(query: np.ndarray, gallery: np.ndarray, positives: np.ndarray, device, group: Group) -> np.ndarray:
    own = [
        torch.from_numpy(np.ascontiguousarray(x[slice(*shard_rows(len(x), group))])).to(device)
        for x in (query, gallery)
    ]
    pairs = torch.from_numpy(positives.astype(np.int64)).to(device)
    local = contrastive_ranks(own[0], own[1], pairs, group=group)
    return gather_rows(local, len(query), group).cpu().numpy()


def metrics(ranks: Ranks) -> dict[str, float | None]:
    """Recalls at 1, 5, 10 and the median rank, both ways."""
    return dict(zip(NAMES, map(float, _figures(ranks, np.ones(len(ranks.image)), np.ones(len(ranks.text))))))


def intervals(ranks: Ranks, *, seed: int = 0) -> dict[str, list[float]]:
    """95 % intervals by bootstrap over images, each drawn with all its captions, for these are no independent
    queries.
    """
    _, image = np.unique(ranks.owner, return_inverse=True)
    everyone = np.arange(len(ranks.text))

    def statistic(weight: np.ndarray) -> np.ndarray:
        return _figures(ranks, weight[image], weight)

    ends = bootstrap(statistic, everyone, seed=seed)
    shares = np.array(["recall" in name for name in NAMES])
    ends[shares] = widen_certain(ends[shares], len(everyone))
    return {name: [float(lo), float(hi)] for name, (lo, hi) in zip(NAMES, ends)}


def chance(ranks: Ranks) -> dict[str, float]:
    """What a random order gives: a caption has 1 right image of N; an image has as many right captions as it
    has.
    """
    captions = len(ranks.owner)
    own = np.unique(ranks.owner, return_counts=True)[1]
    image = {f"image_retrieval_recall@{k}": min(k / ranks.images, 1.0) for k in AT}
    text = {f"text_retrieval_recall@{k}": _hit(own, captions, k) for k in AT}
    return {
        **image,
        "image_retrieval_median_rank": (ranks.images + 1) / 2,
        **text,
        "text_retrieval_median_rank": float(_halving(own, captions)),
    }


def _hit(own: np.ndarray, captions: int, k: int) -> float:
    """The probability, averaged over images, that one of `own` right captions is among k drawn of all."""
    sizes, counts = np.unique(own, return_counts=True)
    left = np.arange(min(k, captions))
    miss = [np.prod(np.clip((captions - c - left) / (captions - left), 0, 1)) for c in sizes]
    return float(((1 - np.array(miss)) * counts).sum() / counts.sum())


def _halving(own: np.ndarray, captions: int) -> int:
    """The smallest k at which `_hit` reaches one half, by bisection."""
    low, high = 1, captions
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _hit(own, captions, middle) >= 0.5 else (middle + 1, high)
    return low


NAMES = tuple(
    f"{way}_retrieval_{figure}" for way in ("image", "text") for figure in (*(f"recall@{k}" for k in AT), "median_rank")
)


def _figures(ranks: Ranks, caption_weight: np.ndarray, image_weight: np.ndarray) -> np.ndarray:
    """The metrics in the order of NAMES, each query counted by its weight."""
    figures = []
    for places, weight in ((ranks.image, caption_weight), (ranks.text, image_weight)):
        total = weight.sum()
        figures += [weight @ (places <= k) / total for k in AT]
        figures.append(weighted_median(places, weight))
    return np.array(figures)
