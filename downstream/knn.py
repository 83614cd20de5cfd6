"""Weighted nearest-neighbour classification of frozen features: nothing is trained, so it shows the features
alone.

Each of the k nearest training images votes for its class with exp(similarity / T). Two protocols are in use
and their figures do not compare, so both are reported: k = 20, T = 0.07 (DINO, Caron et al. 2021) and k =
200, T = 0.1 (Wu et al. 2018; lightly). A class without a vote is never an answer (DINO's code lets it fill up
the five best).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from downstream.classification import Answers, answer
from index.search.exact import exact_topk
from pretrain.distributed.evaluation import gather_rows, shard_rows
from pretrain.distributed.groups import Group
from pretrain.errors import UserError

VOTES = 2**24  # held at once: 128 MiB


class Protocol(NamedTuple):
    """How many neighbours vote, and how steeply a vote falls with distance."""

    name: str
    k: int
    temperature: float


PROTOCOLS = (Protocol("k20", 20, 0.07), Protocol("k200", 200, 0.1))


def vote(similarity: np.ndarray, neighbours: np.ndarray, size: int, temperature: float) -> np.ndarray:
    """Votes for each class, (Q, size) float64, of neighbours' cosines (Q, k) and classes (Q, k).

    exp((s - 1) / T) instead of exp(s / T): the same order, and no overflow at small T.
    """
    weight = np.exp((similarity.astype(np.float64) - 1) / temperature)
    votes = np.zeros((len(similarity), size))
    np.add.at(votes, (np.arange(len(similarity))[:, None], neighbours), weight)
    return votes


def nearest(queries: np.ndarray, bank: np.ndarray, k: int, *, device="auto", group: Group = None):
    """The k nearest rows of `bank` (N, D) for each of `queries` (Q, D), each rank searching a share.

    Unit rows. Returns cosines (Q, k) float32 and rows (Q, k) int64 on every rank; of equal ones the lower row
    first.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    lo, hi = shard_rows(len(queries), group)
    scores, ids = exact_topk(torch.from_numpy(queries[lo:hi]), torch.from_numpy(bank).to(device), min(k, len(bank)))
    return tuple(gather_rows(x.to(device), len(queries), group).cpu().numpy() for x in (scores, ids))


def classify(
    similarity: np.ndarray,
    neighbours: np.ndarray,
    labels: np.ndarray,
    size: int,
    classes: int,
    protocol: Protocol,
) -> Answers:
    """Answers of one protocol from the nearest neighbours (Q, ≥ k), sorted; k beyond their number takes all.

    `neighbours`: their classes; `labels` (Q,): right classes, all below `size`; `classes`: how many a vote
    can name.
    """
    k = min(protocol.k, similarity.shape[1])
    ranks, predicted = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    block = max(1, VOTES // max(size, 1))
    for start in range(0, len(labels), block):
        rows = slice(start, start + block)
        votes = vote(similarity[rows, :k], neighbours[rows, :k], size, protocol.temperature)
        block_ranks, block_predicted = answer(votes, labels[rows], only_positive=True)
        ranks.append(block_ranks)
        predicted.append(block_predicted)
    return Answers(np.concatenate(ranks), np.concatenate(predicted), labels, classes, size)


def check_labels(train: np.ndarray, test: np.ndarray, train_spec: str, test_spec: str) -> None:
    """UserError unless both sides have labelled images."""
    for labels, spec, use in ((train, train_spec, "vote"), (test, test_spec, "be judged")):
        if not len(labels):
            raise UserError(f"{spec}: no sample has a class (a `cls` beside the image), so none can {use}")


def notes(train: np.ndarray, test: np.ndarray, protocols: Sequence[Protocol] = PROTOCOLS) -> list[str]:
    """What a reader must know of these labels: k cut to the bank, classes unseen, a bank out of balance."""
    said = [f"{p.name}: only {len(train)} training images, so k = {len(train)}" for p in protocols if p.k > len(train)]
    unseen = np.setdiff1d(test, train)
    if len(unseen):
        hit = np.isin(test, unseen).sum()
        said.append(f"{len(unseen)} classes of {hit} test images have no training image and cannot be found")
    counts = np.unique(train, return_counts=True)[1]
    share, even = counts.max() / counts.sum(), 1 / len(counts)
    if share > 1.5 * even:
        said.append(f"the largest class holds {100 * share:.1f} % of the training images: always naming it is no feat")
    return said
