"""The contrastive loss of CLIP and the ranks of retrieval: arguments checked, tiles chosen.

Both are computed tile by tile (`tiles.py`): memory grows with N, never with N².
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.distributed.groups import Group
from pretrain.objectives.functional.contrastive import ContrastiveLoss, Setting, Term, backward, forward
from pretrain.objectives.functional.ranks import ranks

CPU_TILE = 1024  # 4 MiB of float32: near a core's L2
GPU_TILE = 4096  # 64 MiB of float32: large enough that the matrix product, not its launch, takes the time


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
    tile: int | None = None,
    group: Group = None,
) -> Tensor:
    """The symmetric loss of CLIP (Radford et al. 2021, §2.3), shape (): the mean over pairs and directions.

    image, text: (B, D) unit rows, pair i in row i; B may differ over ranks and be 0. They are not normalised
    here.
    logit_scale: (1,) or (), the log of the factor on the cosine.
    ids: (B,) integers; two different pairs of equal id, on whatever ranks, are never each other's candidates.
    weight: (B,) ≥ 0; a pair of weight 0 is absent, as query and as candidate, whatever its features hold (NaN
    too);
        the mean is over the total weight. All weights 0, or no pair at all: loss 0, gradients 0.
    smoothing: as `label_smoothing` of torch's cross_entropy, over the candidates: with K the number of
    candidates of
        a query, its positive among them, the target is 1 - smoothing + smoothing / K on the positive and
        smoothing / K on the others.
    tile: edge of a tile; None chooses by device. The value does not depend on it beyond rounding.
    Of `ids` and `weight`, all ranks give one or none does. Only texts travel between ranks, and their
    gradients back.

    Raises ValueError on shapes that do not fit, a negative weight, or smoothing outside [0, 1). Double
    backward is not supported, the gradient is a closed form: create_graph raises RuntimeError.
    """
    check_pairs(image, text, logit_scale, ids, weight, smoothing)
    setting = Setting([Term(0, 0)], smoothing, False, tile_of(tile, image), group)
    return ContrastiveLoss.apply(setting, 1, logit_scale, ids, _column(weight), image, text)[0]


def captions_loss(
    image: Tensor,
    texts: Sequence[Tensor],
    logit_scale: Tensor,
    *,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
    tile: int | None = None,
    group: Group = None,
) -> Tensor:
    """The mean of `clip_loss` over k texts of every image, shape (); all texts travel in one go.

    texts: k times (B, D); a text of image i in row i. One text at a time is set against the images, so that two of one
    image are never each other's candidates.
    weight: (B, k) ≥ 0; 0 where an image has no such text. Every term is the mean over its own column's weight.
    All else is as for `clip_loss`.
    """
    for k, text in enumerate(texts):
        check_pairs(image, text, logit_scale, ids, None if weight is None else weight[:, k], smoothing)
    terms = [Term(0, k, 1 / len(texts)) for k in range(len(texts))]
    setting = Setting(terms, smoothing, False, tile_of(tile, image), group)
    return ContrastiveLoss.apply(setting, 1, logit_scale, ids, weight, image, *texts)[0]


@torch.no_grad()
def contrastive_grads(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
    tile: int | None = None,
    group: Group = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, d_image, d_text, d_logit_scale) without autograd: the door for cached accumulation.

    Value and gradients are, bit for bit, those of `clip_loss(...)` and its backward.
    """
    check_pairs(image, text, logit_scale, ids, weight, smoothing)
    setting = Setting([Term(0, 0)], smoothing, False, tile_of(tile, image), group)
    losses, rows, found = forward(setting, [image], [text], logit_scale, ids, _column(weight))
    (d_image,), (d_text,), d_scale = backward(setting, rows, found, logit_scale)
    return losses[0], d_image, d_text, d_scale


def contrastive_ranks(
    query: Tensor, gallery: Tensor, positives: Tensor, *, tile: int | None = None, group: Group = None
) -> Tensor:
    """(Q,) int64: where, from 1 on, each of this rank's queries finds its best positive in the gallery.

    query (Q, D), gallery (G, D): this rank's rows, any number on each; global numbers run over the ranks in
    order.
    positives: (M, 2) int64 global (query, gallery) pairs; every rank gives at least those of its own queries.
    A rank is 1 + candidates that score strictly higher + candidates of equal score and lower number than the
    query's best positive (of equally good ones, the lowest numbered). A query without a positive gets 1 + the
    size of the gallery, so it is found at no K. A NaN score counts as higher, so a broken model is never
    found to be perfect. Products are summed in float64 and compared as float32, whatever the inputs' dtype:
    ties depend neither on the tile nor on the number of ranks. The gallery is gathered, G·D values on every
    rank.

    Raises ValueError on shapes that do not fit, or a pair beyond the rows there are.
    """
    if query.dim() != 2 or gallery.dim() != 2 or query.shape[1] != gallery.shape[1]:
        shapes = f"{tuple(query.shape)} and {tuple(gallery.shape)}"
        raise ValueError(f"query and gallery must be (Q, D) and (G, D) with the same D, not {shapes}")
    if positives.dim() != 2 or positives.shape[1] != 2:
        raise ValueError(f"positives must be (M, 2) pairs of numbers (query, gallery), not {tuple(positives.shape)}")
    return ranks(query, gallery, positives, tile_of(tile, query), group)


def _column(weight: Tensor | None) -> Tensor | None:
    """One weight a row, as the one term's."""
    return None if weight is None else weight[:, None]


def tile_of(tile: int | None, x: Tensor) -> int:
    """The edge of a tile that is asked for, or that suits the device."""
    if tile is None:
        return CPU_TILE if x.device.type == "cpu" else GPU_TILE
    if tile < 1:
        raise ValueError(f"tile must be at least 1, not {tile}")
    return tile


def check_pairs(image, text, logit_scale, ids, weight, smoothing) -> None:
    if image.dim() != 2 or image.shape != text.shape:
        raise ValueError(f"image and text must both be (B, D), not {tuple(image.shape)} and {tuple(text.shape)}")
    if logit_scale.numel() != 1:
        raise ValueError(f"logit_scale must be one number, shape (1,), not {tuple(logit_scale.shape)}")
    for name, rows in (("ids", ids), ("weight", weight)):
        if rows is not None and rows.shape != image.shape[:1]:
            raise ValueError(f"{name} must be one a pair, shape ({image.shape[0]},), not {tuple(rows.shape)}")
    if weight is not None and bool((weight < 0).any()):
        raise ValueError(f"weight must be ≥ 0, but row {int(weight.argmin())} has {float(weight.min())}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1), not {smoothing}")
