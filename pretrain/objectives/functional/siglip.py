"""The sigmoid loss of SigLIP: every pair of an image and a text is a question of its own, do they belong together.

Nothing normalises the scores, so that one pass over the tiles (`tiles.py`) gives loss and gradients at once, in three
matrix products: a tile is computed, read and dropped. The pass is made in the forward, and what is kept for the
backward is the gradients themselves, as large as the features; where no gradient is wanted, none is computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.distributed.collectives import all_reduce_sum, reduce_scatter_rows
from pretrain.distributed.groups import Group, resolve
from pretrain.objectives.functional.clip import check_pairs, tile_of
from pretrain.objectives.functional.contrastive import Rows, gather, spread_rows
from pretrain.objectives.functional.tiles import Scores, Tile

EXACT = 40.0
"""From here on softplus(x) is x in float64 too: torch's own threshold of 20 is made for float32."""


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    tile: int | None = None,
    group: Group = None,
) -> Tensor:
    """The sigmoid loss (Zhai et al. 2023, §3.2), shape (): -1/N Σ_ij log σ(y_ij (t ⟨image_i, text_j⟩ + b)).

    y is 1 for a pair and -1 for all else, t = exp(logit_scale), N the total weight.

    image, text: (B, D) unit rows, pair i in row i; B may differ over ranks and be 0. They are not normalised here.
    logit_scale: (1,) or (), the log of the factor on the cosine; logit_bias: (1,) or (), b.
    ids: (B,) integers; two different pairs of equal id, on whatever ranks, are never each other's negatives.
    weight: (B,) ≥ 0; a pair of weight 0 is absent on both sides, whatever its features hold (NaN too). One of weight w
        is as w copies of it under one id: w times a positive, and w·v times a negative to a pair of weight v. All
        weights 0, or no pair at all: loss 0, gradients 0.
    tile: edge of a tile; None chooses by device. The value does not depend on it beyond rounding.
    Of `ids` and `weight`, all ranks give one or none does, and they agree on what requires a gradient: the texts'
    gradients travel back in the forward. Images never travel.

    Raises ValueError on shapes that do not fit, or a negative weight. Double backward is not supported: create_graph
    raises RuntimeError.
    """
    check_pairs(image, text, logit_scale, ids, weight, 0.0)
    if logit_bias.numel() != 1:
        raise ValueError(f"logit_bias must be one number, shape (1,), not {tuple(logit_bias.shape)}")
    # within a Function gradients are off: whether the caller wants any is known here alone
    graph = torch.is_grad_enabled()
    return SiglipLoss.apply(image, text, logit_scale, logit_bias, ids, weight, tile_of(tile, image), group, graph)


class SiglipLoss(torch.autograd.Function):
    """The pass in the forward; the backward hands out what it found."""

    @staticmethod
    def forward(ctx, image, text, logit_scale, logit_bias, ids, weight, tile, group, graph):
        for_image, for_text, for_scale, for_bias = (graph and needed for needed in ctx.needs_input_grad[:4])
        rows = gather([image], [text], ids, None if weight is None else weight[:, None], 1, group)
        with torch.autocast(image.device.type, enabled=False):
            scores = _scores(rows, float(logit_scale.double().exp()), tile, group)
            found = _pass(scores, rows.weight[:, 0], float(logit_bias), for_image or for_scale, for_text, for_bias)
            total = rows.weight.sum() if len(rows.weight) else rows.weight.new_ones(())
            loss = all_reduce_sum(found.share, group) / total
            gradients = _gradients(scores, found, total, rows.counts, group)
        likes = (image, text, logit_scale, logit_bias)
        needed = (for_image, for_text, for_scale, for_bias)
        ctx.save_for_backward(*(_as(g, x, rows.kept) if n else None for g, x, n in zip(gradients, likes, needed)))
        return loss

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True: a penalty on the gradient would silently have none
            raise RuntimeError("siglip_loss has no second derivative: call backward without create_graph")
        scaled = (None if d is None else d * grad.to(d.dtype) for d in ctx.saved_tensors)
        return *scaled, None, None, None, None, None


class _Found(NamedTuple):
    """What one pass leaves of G = ∂(loss · total weight) / ∂(scores): sums over this rank's rows."""

    share: Tensor  # () of the loss
    image: Tensor | None  # (b, D) G y
    text: Tensor | None  # (N, D) Gᵀ x
    bias: Tensor  # () ΣG


def _scores(rows: Rows, scale: float, tile: int, group: Group) -> Scores:
    """This rank's images against the texts of all ranks."""
    offset = sum(rows.counts[: resolve(group)[1]])
    image, text = (side.to(rows.weight.dtype) for side in (rows.images[0], rows.texts[0]))
    return Scores(image, text, scale, offset, tile, rows.alike)


def _pass(scores: Scores, weights: Tensor, bias: float, for_image: bool, for_text: bool, for_bias: bool) -> _Found:
    """Every tile once: its share of the loss, and of the gradients that are wanted."""
    found = _Found(
        scores.image.new_zeros(()),
        torch.zeros_like(scores.image) if for_image else None,
        torch.zeros_like(scores.text) if for_text else None,
        scores.image.new_zeros(()),
    )
    weight = weights if bool((weights != 1).any()) else None
    scratch = scores.scratch()
    for tile in scores.tiles():
        wrong = tile.scores.add_(bias)  # from here on the logit of the wrong answer, -y (t ⟨x, y⟩ + b)
        tile.positives.neg_()
        if tile.excluded is not None:
            wrong.masked_fill_(tile.excluded, -torch.inf)
        spare = scratch[: wrong.numel()].view_as(wrong)
        torch.ops.aten.softplus.out(wrong, 1.0, EXACT, out=spare)
        found.share.add_(_weigh(spare, tile, weight, scores.offset).sum())
        if not (for_image or for_text or for_bias):
            continue
        gradient = _weigh(wrong.sigmoid_(), tile, weight, scores.offset)
        tile.positives.neg_()
        found.bias.add_(gradient.sum())
        if found.image is not None:
            found.image[tile.rows].addmm_(gradient, scores.text[tile.columns])
        if found.text is not None:
            found.text[tile.columns].addmm_(gradient.T, scores.image[tile.rows])
    return found


def _weigh(values: Tensor, tile: Tile, weight: Tensor | None, offset: int) -> Tensor:
    """(h, w) in place: w_i w_j on a negative, w_i on a positive. None: all weights are 1."""
    if weight is None:
        return values
    own, positives = weight[tile.rows.start + offset : tile.rows.stop + offset], values.diagonal(tile.diagonal)
    once = positives * weight[tile.positive_rows.start + offset : tile.positive_rows.stop + offset]
    values.mul_(own[:, None]).mul_(weight[tile.columns])
    positives.copy_(once)
    return values


def _gradients(scores: Scores, found: _Found, total: Tensor, counts: list[int], group: Group) -> list[Tensor | None]:
    """W × this rank's share for image, text, logit_scale, logit_bias; ∂L/∂ log t = Σ G·T = Σ_i ⟨x_i, ∂L/∂x_i⟩."""
    factor = resolve(group)[2] / total
    d_image = d_text = d_scale = None
    if found.image is not None:
        d_image = found.image.mul_(factor * scores.scale)
        d_scale = (scores.image * d_image).sum()
    if found.text is not None:
        d_text = reduce_scatter_rows(found.text, counts, group).mul_(factor * scores.scale)
    return [d_image, d_text, d_scale, found.bias * factor]


def _as(gradient: Tensor | None, like: Tensor, kept: Tensor | None) -> Tensor | None:
    """A gradient in its input's shape and dtype: rows that took no part get exactly 0."""
    if gradient is None:
        return None
    if gradient.dim():
        return spread_rows(gradient.to(like.dtype), kept)
    return gradient.to(like.dtype).view_as(like)
