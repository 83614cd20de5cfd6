"""A source's images and captions as vectors, over ranks: each encodes a share, and all hold the whole, in order.

What is shared out are whole batches of a fixed size (the last is filled up and cut again), so that every
batch is the same at any number of ranks, and so is every vector, to the last bit. All ranks take as many, an empty
one at the end where there are not enough: a sharded tower gathers its weights in every forward. Each distinct text is
encoded once: equal captions have equal vectors, and ties stay ties. A sample that cannot be read is masked
(its row is zero, `whole` is False), named in the log, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.samples import Samples
from downstream.weights import Output, Towers
from pretrain.distributed.evaluation import gather_rows, shard_rows
from pretrain.distributed.groups import Group, resolve
from pretrain.errors import UserError
from pretrain.views.decode import DamagedSample

T = TypeVar("T")

IMAGE_ROWS, TEXT_ROWS = 64, 256  # rows a batch
THREADS = 2  # decoding; the tower takes the rest

Batch = tuple[Tensor, Tensor]
"""Pixels (IMAGE_ROWS, 3, S, S) uint8, and (IMAGE_ROWS,) bool: which rows are whole images; the others are black."""
Decoder = Callable[[Towers, Samples, Sequence[range]], Iterator[Batch]]


@dataclass
class Images:
    """All images of a source."""

    vectors: np.ndarray  # (N, D) float32 unit rows; zero where not whole
    whole: np.ndarray  # (N,) bool
    labels: np.ndarray  # (N,) int64, -1 = none


@dataclass
class Texts:
    """All captions of a source as they are written, image after image."""

    texts: list[str]
    image: np.ndarray  # (Q,) int64: the sample each belongs to
    damaged: int  # samples whose captions could not be read


@dataclass
class Captions(Texts):
    """And their vectors."""

    vectors: np.ndarray  # (Q, D) float32 unit rows


def encode_images(towers: Towers, samples: Samples, *, output: Output = "embedding", group: Group = None) -> Images:
    """Every image and label of `samples` on every rank.

    Raises:
        UserError: not one image could be read, or a label is no number.
    """
    features, whole = image_features(towers, samples, (output,), group=group)
    own = torch.from_numpy(samples.labels(range(*shard_rows(len(samples), group)))).to(towers.device)
    labels = gather_rows(own, len(samples), group).cpu().numpy()
    return Images(unit_rows(features[output]), whole, labels)


def image_features(
    towers: Towers,
    samples: Samples,
    outputs: Sequence[Output],
    *,
    group: Group = None,
    decoder: Decoder | None = None,
) -> tuple[dict[Output, np.ndarray], np.ndarray]:
    """(N, D) float32 for each output, of the length the tower gave them, and which images are whole, (N,) bool.

    Raises:
        UserError: not one image could be read.
    """
    parts: dict[Output, list[Tensor]] = {output: [] for output in outputs}
    masks = []
    blocks = _blocks(len(samples), IMAGE_ROWS, group)
    for pixels, whole in (decoder or decoded)(towers, samples, blocks):
        mask = whole.to(towers.device)
        for output, features in towers.image_features(pixels, outputs).items():
            parts[output].append(torch.where(mask[:, None], features, 0))
        masks.append(mask.byte())
    known = _gather(masks, len(samples), IMAGE_ROWS, towers, group)
    if not known.any():
        raise UserError(f"{samples.spec}: none of its {len(samples):,} samples has an image that can be read")
    return {o: _gather(found, len(samples), IMAGE_ROWS, towers, group) for o, found in parts.items()}, known == 1


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Each row at length 1; rows of zeros as they are."""
    return F.normalize(torch.from_numpy(features), dim=-1).numpy()


def encode_captions(towers: Towers, samples: Samples, *, group: Group = None) -> Captions:
    """Every caption of `samples` on every rank; a sample may have none. The texts are read by every rank.

    Raises:
        UserError: the encoder reads no text, or not one sample has a caption.
    """
    written = read_captions(samples)
    return Captions(**vars(written), vectors=encode_texts(towers, written.texts, group=group))


def read_captions(samples: Samples) -> Texts:
    """Every caption of `samples`; UserError where none has one."""
    each = [_or_left_out(samples, i, samples.captions) for i in range(len(samples))]
    texts = [text for captions in each for text in captions or ()]
    if not texts:
        raise UserError(f"{samples.spec}: none of its samples has a caption (a `txt` beside the image)")
    image = np.repeat(np.arange(len(each)), [len(captions or ()) for captions in each])
    return Texts(texts, image, each.count(None))


def encode_texts(towers: Towers, texts: list[str], *, group: Group = None) -> np.ndarray:
    """(len(texts), D) float32 unit rows of texts that every rank knows, each rank encoding a share.

    Raises:
        UserError: the encoder has no text tower.
    """
    if not towers.has_text:
        raise UserError(f"{towers.name}: this encoder has no text tower (model.text: null), which is needed here")
    # of like length together: a batch is computed up to its longest text
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    parts = []
    for block in _blocks(len(distinct), TEXT_ROWS, group):
        rows = [distinct[i] for i in block]
        parts.append(towers.text_vectors([*rows, *[""] * (TEXT_ROWS - len(rows))]))
    vectors = _gather(parts, len(distinct), TEXT_ROWS, towers, group)
    place = {text: i for i, text in enumerate(distinct)}
    return vectors[[place[text] for text in texts]]


def _blocks(n: int, rows: int, group: Group) -> list[range]:
    """The batches of `rows` out of `n` that are this rank's, and an empty one where other ranks have one more."""
    batches, world = -(-n // rows), resolve(group)[2]
    lo, hi = shard_rows(batches, group)
    own = [range(b * rows, min((b + 1) * rows, n)) for b in range(lo, hi)]
    return own + [range(0)] * (-(-batches // world) - len(own))


def _gather(parts: list[Tensor], n: int, rows: int, towers: Towers, group: Group) -> np.ndarray:
    """All ranks' batches (rows, …) as (n, …) on every rank, without what fills up.

    Raises:
        UserError: a number that is not finite, on all ranks alike.
    """
    batches = -(-n // rows)
    lo, hi = shard_rows(batches, group)
    local = torch.stack(parts)[: hi - lo].to(towers.device)
    found = gather_rows(local, batches, group).flatten(0, 1)[:n].cpu().numpy()
    if not np.isfinite(found).all():
        raise UserError(f"{towers.name} gives vectors that are not finite: choose one from before it diverged")
    return found


def decoded(towers: Towers, samples: Samples, blocks: Sequence[range]) -> Iterator[Batch]:
    """The images of each block; the next block is decoded meanwhile."""

    def prepare(sample: int, data: bytes) -> Tensor | None:
        return _or_left_out(samples, sample, lambda _: towers.preprocess(data))

    with ThreadPoolExecutor(THREADS) as pool:
        ahead: list[Future | None] | None = None
        for block in blocks:
            data = [_or_left_out(samples, i, samples.image) for i in block]
            jobs = [None if d is None else pool.submit(prepare, i, d) for i, d in zip(block, data)]
            if ahead is not None:
                yield _batch(ahead, towers.image_size)
            ahead = jobs
        if ahead is not None:
            yield _batch(ahead, towers.image_size)


def _batch(jobs: list[Future | None], size: int) -> Batch:
    pixels = torch.zeros(IMAGE_ROWS, 3, size, size, dtype=torch.uint8)
    whole = torch.zeros(IMAGE_ROWS, dtype=torch.bool)
    for row, job in enumerate(jobs):
        if job is not None and (image := job.result()) is not None:
            pixels[row], whole[row] = image, True
    return pixels, whole


def _or_left_out(samples: Samples, sample: int, read: Callable[[int], T]) -> T | None:
    """What `read(sample)` gives; None, and a line in the log, for a sample that cannot be used."""
    try:
        return read(sample)
    except DamagedSample as damage:
        samples.leave_out(sample, damage.reason)
        return None
