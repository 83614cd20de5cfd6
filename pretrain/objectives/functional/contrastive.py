"""The contrastive loss over ranks, in closed form: who takes part, what travels, value and gradient.

`forward` and `backward` are plain functions of tensors; `ClipLoss` hands them to autograd. Pairs of weight 0
are taken out before anything is computed, so nothing they hold can reach the others, and the tiles know no
mask for them. Then the texts of all ranks are gathered (images never move), each rank goes over its own rows
of the score matrix, and what the ranks found about the columns is merged; the backward computes the tiles
again and adds the texts' gradients over ranks. Arguments are checked in `functional.py`, scores computed in
`tiles.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.distributed.collectives import (
    all_gather_rows,
    all_reduce_max,
    all_reduce_sum,
    reduce_scatter_rows,
    row_counts,
)
from pretrain.distributed.groups import Group, resolve
from pretrain.objectives.functional.tiles import Scores, gradients, normalise


class Pairs(NamedTuple):
    """The pairs that take part, as tensors that a backward can start again from."""

    image: Tensor  # (b, D) this rank's, in the caller's dtype
    text: Tensor  # (N, D) all ranks', in the caller's dtype
    weight: Tensor  # (N,) > 0
    alike: Tensor | None  # (N,) equal numbers for equal ids; None where all ids differ
    kept: Tensor | None  # (B,) bool: rows of the caller's batch that take part; None: all


class Setting(NamedTuple):
    """What is known before the first tile."""

    scale: float
    smoothing: float
    tile: int
    counts: list[int]  # pairs that take part, by rank
    group: Group

    @property
    def own(self) -> slice:
        """This rank's pairs among all."""
        _, rank, _ = resolve(self.group)
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])


class Found(NamedTuple):
    """What the forward leaves for the backward."""

    rows: Tensor  # (b,) log-sum-exp of this rank's rows
    columns: Tensor  # (N,) log-sum-exp of all columns over all ranks
    total: Tensor  # () total weight; 1 where there is no pair
    shift: float | None  # see tiles.normalise


class ClipLoss(torch.autograd.Function):
    """`forward` and `backward` for autograd: keeps the features and vectors of length N, no scores."""

    @staticmethod
    def forward(ctx, image, text, logit_scale, ids, weight, smoothing, tile, group):
        loss, pairs, setting, found = forward(image, text, logit_scale, ids, weight, smoothing, tile, group)
        ctx.save_for_backward(logit_scale, found.rows, found.columns, found.total, *pairs)
        ctx.setting, ctx.shift = setting, found.shift
        return loss

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True: a penalty on the gradient would silently have none
            raise RuntimeError("clip_loss has no second derivative: call backward without create_graph")
        logit_scale, rows, columns, total, *pairs = ctx.saved_tensors
        found = Found(rows, columns, total, ctx.shift)
        gradient = backward(Pairs(*pairs), ctx.setting, found, logit_scale)
        return *(d * grad.to(d.dtype) for d in gradient), None, None, None, None, None


def forward(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    ids: Tensor | None,
    weight: Tensor | None,
    smoothing: float,
    tile: int,
    group: Group,
) -> tuple[Tensor, Pairs, Setting, Found]:
    """The global mean loss (), and what its gradient needs."""
    pairs, counts = _gather(image, text, ids, weight, group)
    setting = Setting(float(logit_scale.detach().double().exp()), smoothing, tile, counts, group)
    own = setting.own
    total = pairs.weight.sum() if sum(counts) else pairs.weight.new_ones(())
    with torch.autocast(image.device.type, enabled=False):
        local = normalise(_scores(pairs, setting))
        columns = _over_ranks(local.columns, group)
        per_pair = local.rows + columns[own] - 2 * (1 - smoothing) * local.positives
        share = (pairs.weight[own] * per_pair).sum() - local.smoothed
        loss = all_reduce_sum(share, group) / (2 * total)
    return loss, pairs, setting, Found(local.rows, columns, total, local.shift)


def backward(pairs: Pairs, setting: Setting, found: Found, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W × this rank's share of the gradient for image, text, logit_scale, in their shapes and dtypes.

    The temperature's falls out of the images': ∂L/∂ log s = Σ G·T = Σ_i ⟨x_i, ∂L/∂x_i⟩.
    """
    own = setting.own
    world = resolve(setting.group)[2]
    with torch.autocast(pairs.image.device.type, enabled=False):
        scores = _scores(pairs, setting)
        log_weight = pairs.weight.log()
        targets = 2 * (1 - setting.smoothing) * pairs.weight[own]
        d_image, d_text = gradients(
            scores, found.rows - log_weight[own], found.columns - log_weight, targets, found.shift
        )
        factor = world * setting.scale / (2 * found.total)
        d_image.mul_(factor)
        d_text = reduce_scatter_rows(d_text, setting.counts, setting.group).mul_(factor)
        d_scale = (scores.image * d_image).sum()
    return (
        _spread(d_image.to(pairs.image.dtype), pairs.kept),
        _spread(d_text.to(pairs.text.dtype), pairs.kept),
        d_scale.to(logit_scale.dtype).view_as(logit_scale),
    )


def _gather(image, text, ids, weight, group) -> tuple[Pairs, list[int]]:
    """Leave out the pairs of weight 0, then bring together what every rank must see of the others'."""
    device = image.device
    kept = None if weight is None else weight.to(device) > 0
    if kept is not None:
        image, text, weight = image[kept], text[kept], weight.to(device)[kept]
        ids = None if ids is None else ids.to(device)[kept]
    counts = row_counts(image.shape[0], device, group)
    dtype = _dtype(image, text)
    if weight is None:
        weights = torch.ones(sum(counts), dtype=dtype, device=device)
    else:
        weights = all_gather_rows(weight.to(dtype), group, counts)
    alike = None if ids is None else _alike(all_gather_rows(ids.to(device), group, counts))
    return Pairs(image, all_gather_rows(text, group, counts), weights, alike, kept), counts


def _alike(ids: Tensor) -> Tensor | None:
    """(N,) int32, equal where ids are; None where no two are, which spares the tiles their masks."""
    values, inverse = ids.unique(return_inverse=True)
    return inverse.int() if len(values) < len(ids) else None


def _scores(pairs: Pairs, setting: Setting) -> Scores:
    dtype = _dtype(pairs.image, pairs.text)
    smooth = setting.smoothing * pairs.weight / _candidates(pairs) if setting.smoothing else None
    image, text = pairs.image.detach().to(dtype), pairs.text.detach().to(dtype)
    return Scores(image, text, setting.scale, setting.own.start, setting.tile, pairs.alike, smooth)


def _candidates(pairs: Pairs) -> Tensor | int:
    """How many candidates a query has, the same in both directions: all pairs but the others of its id."""
    n = pairs.text.shape[0]
    if pairs.alike is None:
        return n
    return n + 1 - pairs.alike.bincount()[pairs.alike.long()]


def _over_ranks(columns: Tensor, group: Group) -> Tensor:
    """Log-sum-exp of (N,) logs over ranks, by two reductions of N values: not W × N of memory."""
    if resolve(group)[2] == 1:
        return columns
    highest = all_reduce_max(columns.clone(), group)
    return all_reduce_sum((columns - highest).exp(), group).log() + highest


def _spread(gradient: Tensor, kept: Tensor | None) -> Tensor:
    """(b, D) -> (B, D): rows that took no part get exactly 0."""
    if kept is None:
        return gradient
    full = gradient.new_zeros((kept.shape[0], *gradient.shape[1:]))
    full[kept] = gradient
    return full


def _dtype(image: Tensor, text: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
