"""A source's images and captions as unit vectors, over ranks: each encodes a share, and all hold the whole,
in order.

What is shared out are whole batches of a fixed size (the last is filled up and cut again), so that every
batch is the same at any number of ranks, and so is every vector, to the last bit. Each distinct text is
encoded once: equal captions have equal vectors, and ties stay ties. A sample that cannot be read is masked
(its row is zero, `whole` is False), named in the log, and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from downstream.samples import Samples
from downstream.weights import Output, Weights
from pretrain.distributed.evaluation import gather_rows, shard_rows
from pretrain.distributed.groups import Group
from pretrain.errors import UserError
from pretrain.views.decode import DamagedSample

log = logging.getLogger(__name__)
T = TypeVar("T")

IMAGE_ROWS, TEXT_ROWS = 64, 256  # rows a batch
THREADS = 2  # decoding; the tower takes the rest


@dataclass
class Images:
    """All images of a source."""

    vectors: np.ndarray  # (N, D) float32 unit rows; zero where not whole
    whole: np.ndarray  # (N,) bool
    labels: np.ndarray  # (N,) int64, -1 = none


@dataclass
class Captions:
    """All captions of a source, image after image."""

    vectors: np.ndarray  # (Q, D) float32 unit rows
    texts: list[str]
    image: np.ndarray  # (Q,) int64: the sample each belongs to
    damaged: int  # samples whose captions could not be read


def encode_images(weights: Weights, samples: Samples, *, output: Output = "embedding", group: Group = None) -> Images:
    """Every image and label of `samples` on every rank.

    Raises:
        UserError: not one image could be read, or a label is no number.
    """
    blocks = _blocks(len(samples), IMAGE_ROWS, group)
    vectors, facts = [], []
    for block, pixels in zip(blocks, _prepared(weights, samples, blocks)):
        encoded, whole = _encode(weights, pixels, output)
        vectors.append(encoded)
        facts.append(_filled(torch.tensor([[w, samples.label(i)] for w, i in zip(whole, block)]), IMAGE_ROWS))
    every = _gather(vectors, len(samples), IMAGE_ROWS, weights.width(output), weights, group)
    known = _gather(facts, len(samples), IMAGE_ROWS, 2, weights, group, torch.int64)
    if not known[:, 0].any():
        raise UserError(f"{samples.spec}: none of its {len(samples):,} samples has an image that can be read")
    return Images(every, known[:, 0] == 1, known[:, 1])


def encode_captions(weights: Weights, samples: Samples, *, group: Group = None) -> Captions:
    """Every caption of `samples` on every rank; a sample may have none. The texts are read by every rank.

    Raises:
        UserError: the encoder reads no text, or not one sample has a caption.
    """
    each = [_or_damaged(samples, i, samples.captions) for i in range(len(samples))]
    texts = [text for captions in each for text in captions or ()]
    if not texts:
        raise UserError(f"{samples.spec}: none of its samples has a caption (a `txt` beside the image)")
    image = np.repeat(np.arange(len(each)), [len(captions or ()) for captions in each])
    return Captions(encode_texts(weights, texts, group=group), texts, image, each.count(None))


def encode_texts(weights: Weights, texts: list[str], *, group: Group = None) -> np.ndarray:
    """(len(texts), D) float32 unit rows of texts that every rank knows, each rank encoding a share.

    Raises:
        UserError: the encoder has no text tower.
    """
    if not weights.encoder.has_text:
        raise UserError(f"{weights.run}: this encoder has no text tower (model.text: null), which is needed here")
    # of like length together: a batch is computed up to its longest text
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    parts = []
    for block in _blocks(len(distinct), TEXT_ROWS, group):
        rows = [distinct[i] for i in block]
        encoded = weights.encoder.encode_text([*rows, *[""] * (TEXT_ROWS - len(rows))], batch_size=TEXT_ROWS)
        parts.append(torch.from_numpy(encoded))
    vectors = _gather(parts, len(distinct), TEXT_ROWS, weights.encoder.dim, weights, group)
    place = {text: i for i, text in enumerate(distinct)}
    return vectors[[place[text] for text in texts]]


def _blocks(n: int, rows: int, group: Group) -> list[range]:
    """The batches of `rows` out of `n` that are this rank's."""
    lo, hi = shard_rows(-(-n // rows), group)
    return [range(b * rows, min((b + 1) * rows, n)) for b in range(lo, hi)]


def _gather(
    parts: list[Tensor],
    n: int,
    rows: int,
    width: int,
    weights: Weights,
    group: Group,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """All ranks' batches (rows, width) as (n, width) on every rank, without what fills up the last.

    Raises:
        UserError: a number that is not finite, on all ranks alike.
    """
    device = weights.encoder.device
    local = torch.stack(parts).to(device) if parts else torch.zeros(0, rows, width, dtype=dtype, device=device)
    found = gather_rows(local, -(-n // rows), group).flatten(0, 1)[:n].cpu().numpy()
    if not np.isfinite(found).all():
        raise UserError(f"{weights.name} gives vectors that are not finite: choose one from before it diverged")
    return found


def _encode(weights: Weights, pixels: list[Tensor | None], output: Output) -> tuple[Tensor, list[bool]]:
    """Vectors (IMAGE_ROWS, D) and which of the images were whole; a damaged one goes in black and comes out
    zero.
    """
    size = weights.encoder.image_size
    black = torch.zeros(3, size, size, dtype=torch.uint8)
    batch = _filled(torch.stack([black if p is None else p for p in pixels]), IMAGE_ROWS)
    vectors = weights.image_features(batch, output)
    whole = [p is not None for p in pixels]
    mask = torch.tensor([*whole, *[False] * (IMAGE_ROWS - len(whole))], device=vectors.device)
    return torch.where(mask[:, None], vectors, 0), whole


def _filled(x: Tensor, rows: int) -> Tensor:
    """`x` (b, …) with rows of zeros up to `rows`."""
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def _prepared(weights: Weights, samples: Samples, blocks: Iterable[range]) -> Iterator[list[Tensor | None]]:
    """The images (3, S, S) of each block, None for damaged ones; the next block is decoded meanwhile."""

    def prepare(sample: int, data: bytes) -> Tensor | None:
        return _or_damaged(samples, sample, lambda _: weights.encoder.preprocess(data))

    with ThreadPoolExecutor(THREADS) as pool:
        ahead: list[Future | None] | None = None
        for block in blocks:
            data = [_or_damaged(samples, i, samples.image) for i in block]
            jobs = [None if d is None else pool.submit(prepare, i, d) for i, d in zip(block, data)]
            if ahead is not None:
                yield [None if job is None else job.result() for job in ahead]
            ahead = jobs
        if ahead is not None:
            yield [None if job is None else job.result() for job in ahead]


def _or_damaged(samples: Samples, sample: int, read: Callable[[int], T]) -> T | None:
    """What `read(sample)` gives; None, and a line in the log, for a sample that cannot be used."""
    try:
        return read(sample)
    except DamagedSample as damage:
        log.warning("left out: %s (%s)", samples.key(sample), damage.reason)
        return None
