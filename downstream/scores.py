"""Vectors in, places and answers out: what a command reports with intervals, and a live evaluation as bare figures.

Called by all ranks together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from downstream import knn, retrieval, zeroshot
from downstream.classification import Answers
from downstream.features import Captions, Images
from pretrain.distributed.groups import Group
from pretrain.errors import UserError


@dataclass
class Retrieved:
    """Images and captions that can be read, and where the partner of each stood."""

    ids: np.ndarray  # (N,) the images' numbers in the source
    images: np.ndarray  # (N, D) unit rows
    usable: np.ndarray  # (Q,) the captions' numbers in the source
    captions: np.ndarray  # (Q, D) unit rows
    ranks: retrieval.Ranks


def retrieve(
    images: Images, captions: Captions, spec: str, *, device: str | torch.device = "cpu", group: Group = None
) -> Retrieved:
    """Retrieval over all images and captions of one source.

    Raises:
        UserError: no sample has both an image and a caption that can be read.
    """
    usable = np.flatnonzero(images.whole[captions.image])
    ids = np.flatnonzero(images.whole)
    owner = (np.cumsum(images.whole) - 1)[captions.image[usable]]
    vectors, texts = images.vectors[ids], captions.vectors[usable]
    if not len(texts):
        raise UserError(f"{spec}: no sample has both an image and a caption that can be read")
    return Retrieved(ids, vectors, usable, texts, retrieval.rank(vectors, texts, owner, device=device, group=group))


@dataclass
class Neighbours:
    """Labelled images that can be read, and for each test image the nearest training images, nearest first."""

    train_ids: np.ndarray  # (N,) numbers in the source
    test_ids: np.ndarray  # (Q,)
    train_labels: np.ndarray  # (N,)
    test_labels: np.ndarray  # (Q,)
    similarity: np.ndarray  # (Q, k) cosines
    found: np.ndarray  # (Q, k) rows of train_ids

    @property
    def classes(self) -> int:
        """How many classes a vote can name."""
        return len(np.unique(self.train_labels))

    @property
    def size(self) -> int:
        """Class numbers are below this."""
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1

    def answers(self, protocol: knn.Protocol) -> Answers:
        """What the neighbours vote for."""
        voted = self.train_labels[self.found]
        return knn.classify(self.similarity, voted, self.test_labels, self.size, self.classes, protocol)


def neighbours(
    bank: Images,
    queries: Images,
    k: int,
    train_spec: str,
    test_spec: str,
    *,
    device: str | torch.device = "cpu",
    group: Group = None,
) -> Neighbours:
    """The k nearest of `bank` for each of `queries`.

    Raises:
        UserError: no labelled image that can be read on either side.
    """
    train_ids, test_ids = (np.flatnonzero(x.whole & (x.labels >= 0)) for x in (bank, queries))
    train_labels, test_labels = bank.labels[train_ids], queries.labels[test_ids]
    knn.check_labels(train_labels, test_labels, train_spec, test_spec)
    similarity, found = knn.nearest(queries.vectors[test_ids], bank.vectors[train_ids], k, device=device, group=group)
    return Neighbours(train_ids, test_ids, train_labels, test_labels, similarity, found)


@dataclass
class Named:
    """Labelled images that can be read, and the class name each takes."""

    ids: np.ndarray  # (Q,) numbers in the source
    images: np.ndarray  # (Q, D) unit rows
    labels: np.ndarray  # (Q,)
    names: np.ndarray  # (classes, D) unit rows
    answers: Answers


def name(images: Images, prompts: np.ndarray, classes: int) -> Named:
    """Zero-shot classification by the unit vectors of the prompts (classes · templates, D)."""
    ids = np.flatnonzero(images.whole & (images.labels >= 0))
    vectors, labels = images.vectors[ids], images.labels[ids]
    names = zeroshot.classifier(prompts, classes)
    return Named(ids, vectors, labels, names, zeroshot.classify(vectors, names, labels))
