"""The contrastive loss over ranks, in closed form: who takes part, what travels, value and gradient.

A loss is a sum of terms; a term sets one matrix of image features against one of text features. CLIP has one term,
PyramidCLIP six over three matrices a side, several captions an image one a caption. `forward` and `backward` are plain
functions of tensors; `ContrastiveLoss` hands them to autograd. Pairs of weight 0 in a term are taken out of it before
anything is computed, so nothing they hold can reach the others, and the tiles know no mask for them. The texts of all
ranks are gathered in one go (images never move), each rank goes over its own rows of every term's score matrix, and
what the ranks found about the columns is merged, for all terms at once; the backward computes the tiles again and adds
the texts' gradients over ranks. Arguments are checked in `clip.py` and `pyramid.py`, scores computed in `tiles.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from pretrain.objectives.functional.tiles import Normalisers, Scores, gradients, normalise


class Term(NamedTuple):
    """One contrast: which image matrix against which text matrix, and its factor in the loss."""

    image: int
    text: int
    share: float = 1.0


class Setting(NamedTuple):
    """What is known before the first tile."""

    terms: Sequence[Term]
    smoothing: float
    softened: bool
    """False: smoothing is torch's, spread over all candidates; True: over the candidates but the positive."""
    tile: int
    group: Group


class Rows(NamedTuple):
    """The rows that take part in any term, as tensors that a backward can start again from."""

    images: Sequence[Tensor]  # each (b, D), this rank's, in the caller's dtype
    texts: Sequence[Tensor]  # each (N, D), all ranks', in the caller's dtype
    weight: Tensor  # (N, terms) ≥ 0
    alike: Tensor | None  # (N,) equal numbers for equal ids; None where all ids differ
    kept: Tensor | None  # (B,) bool: rows of the caller's batch that take part; None: all
    counts: list[int]  # rows that take part, by rank


class Pairs(NamedTuple):
    """One term's pairs, all of weight above 0."""

    image: Tensor  # (m, D) this rank's
    text: Tensor  # (M, D) all ranks'
    weight: Tensor  # (M,)
    alike: Tensor | None  # (M,)
    own: slice  # this rank's among the M
    places: Tensor | None  # (M,) which of the N rows they are; None: all of them, in order
    own_places: Tensor | None  # (m,) which of the rank's b rows

    @property
    def total(self) -> Tensor:
        """() total weight; 1 where there is no pair."""
        return self.weight.sum() if len(self.weight) else self.weight.new_ones(())

    def candidates(self) -> Tensor:
        """(M,) or () how many candidates a pair has, the same in both directions: all but the others of its id."""
        size = len(self.weight)
        if self.alike is None:
            return self.weight.new_tensor(float(size))
        return size + 1 - self.alike.bincount()[self.alike.long()].to(self.weight.dtype)


class Found(NamedTuple):
    """What the forward of one term leaves for its backward."""

    rows: Tensor  # (m,) log-sum-exp of this rank's rows
    columns: Tensor  # (M,) log-sum-exp of all columns over all ranks
    shift: float | None  # see tiles.normalise


class ContrastiveLoss(torch.autograd.Function):
    """`forward` and `backward` for autograd: keeps the features and vectors of length N, no scores.

    `features` are first the `sides` image matrices, then the text matrices. Beside the loss it gives (terms,) every
    term's own, before its factor, without gradient.
    """

    @staticmethod
    def forward(ctx, setting, sides, logit_scale, ids, weight, *features):
        images, texts = features[:sides], features[sides:]
        losses, rows, found = forward(setting, images, texts, logit_scale, ids, weight)
        ctx.mark_non_differentiable(losses)
        logs = [log for one in found for log in (one.rows, one.columns)]
        ctx.save_for_backward(logit_scale, rows.weight, rows.alike, rows.kept, *rows.images, *rows.texts, *logs)
        ctx.setting, ctx.sides, ctx.counts, ctx.shifts = setting, sides, rows.counts, [one.shift for one in found]
        ctx.features = len(features)
        return weighed(losses, setting), losses

    @staticmethod
    def backward(ctx, grad, _):
        if torch.is_grad_enabled():  # create_graph=True: a penalty on the gradient would silently have none
            raise RuntimeError("contrastive losses have no second derivative: call backward without create_graph")
        logit_scale, weight, alike, kept, *saved = ctx.saved_tensors
        features, logs = saved[: ctx.features], saved[ctx.features :]
        rows = Rows(features[: ctx.sides], features[ctx.sides :], weight, alike, kept, ctx.counts)
        found = [Found(log_rows, columns, shift) for log_rows, columns, shift in zip(logs[::2], logs[1::2], ctx.shifts)]
        d_images, d_texts, d_scale = backward(ctx.setting, rows, found, logit_scale)
        scaled = (d * grad.to(d.dtype) for d in (d_scale, *d_images, *d_texts))
        return None, None, next(scaled), None, None, *scaled


def forward(
    setting: Setting,
    images: Sequence[Tensor],
    texts: Sequence[Tensor],
    logit_scale: Tensor,
    ids: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Rows, list[Found]]:
    """(terms,) their global mean losses, and what the gradient needs. `weight` is (B, terms), or None: all 1."""
    rows = gather(images, texts, ids, weight, len(setting.terms), setting.group)
    terms = _pairs(rows, setting)
    scale = float(logit_scale.detach().double().exp())
    with torch.autocast(rows.weight.device.type, enabled=False):
        local = [normalise(_scores(pairs, setting, scale)) for pairs in terms]
        columns = _over_ranks([one.columns for one in local], setting.group)
        found = [Found(one.rows, column, one.shift) for one, column in zip(local, columns)]
        shares = torch.stack([_share(*one, setting) for one in zip(terms, local, columns)])
        losses = all_reduce_sum(shares, setting.group) / torch.stack([2 * pairs.total for pairs in terms])
    return losses, rows, found


def weighed(losses: Tensor, setting: Setting) -> Tensor:
    """() the sum of the terms' losses, each with its factor."""
    return (losses.new_tensor([term.share for term in setting.terms]) * losses).sum()


def backward(
    setting: Setting, rows: Rows, found: Sequence[Found], logit_scale: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """W × this rank's share of the gradient for every image and text matrix and for logit_scale.

    The temperature's falls out of the images': ∂L/∂ log s = Σ G·T = Σ_i ⟨x_i, ∂L/∂x_i⟩.
    """
    world = resolve(setting.group)[2]
    dtype, scale = rows.weight.dtype, float(logit_scale.detach().double().exp())
    d_images = [x.new_zeros(x.shape, dtype=dtype) for x in rows.images]
    d_texts = [x.new_zeros(x.shape, dtype=dtype) for x in rows.texts]
    d_scale = rows.weight.new_zeros(())
    with torch.autocast(rows.weight.device.type, enabled=False):
        for term, pairs, one in zip(setting.terms, _pairs(rows, setting), found):
            scores = _scores(pairs, setting, scale)
            d_image, d_text = _gradients(scores, pairs, one, setting)
            factor = world * scale * term.share / (2 * pairs.total)
            d_scale += (scores.image * d_image.mul_(factor)).sum()
            _add(d_images[term.image], d_image, pairs.own_places)
            _add(d_texts[term.text], d_text.mul_(factor), pairs.places)
        own_d_texts = _scatter_side_by_side(d_texts, rows.counts, setting.group)
    return (
        [spread_rows(d.to(x.dtype), rows.kept) for d, x in zip(d_images, rows.images)],
        [spread_rows(d.to(x.dtype), rows.kept) for d, x in zip(own_d_texts, rows.texts)],
        d_scale.to(logit_scale.dtype).view_as(logit_scale),
    )


def gather(
    images: Sequence[Tensor],
    texts: Sequence[Tensor],
    ids: Tensor | None,
    weight: Tensor | None,
    terms: int,
    group: Group,
) -> Rows:
    """Leave out the rows that no term counts, then bring together what every rank must see of the others'."""
    device = images[0].device
    kept = None
    if weight is not None:
        weight = weight.to(device)
        kept = (weight > 0).any(dim=1)
        images, texts, weight = [x[kept] for x in images], [x[kept] for x in texts], weight[kept]
        ids = None if ids is None else ids.to(device)[kept]
    counts = row_counts(len(images[0]), device, group)
    dtype = _dtype(*images, *texts)
    if weight is None:
        weights = torch.ones(sum(counts), terms, dtype=dtype, device=device)
    else:
        weights = all_gather_rows(weight.to(dtype), group, counts)
    alike = None if ids is None else _alike(all_gather_rows(ids.to(device), group, counts))
    return Rows(images, _gather_side_by_side(texts, counts, group), weights, alike, kept, counts)


def _gather_side_by_side(texts: Sequence[Tensor], counts: list[int], group: Group) -> Sequence[Tensor]:
    """Every (b, D) of `texts` as (N, D), by one collective."""
    if resolve(group)[2] == 1:
        return [x.detach() for x in texts]
    return all_gather_rows(torch.cat(list(texts), dim=1), group, counts).split([x.shape[1] for x in texts], dim=1)


def _scatter_side_by_side(d_texts: Sequence[Tensor], counts: list[int], group: Group) -> Sequence[Tensor]:
    """The rank's own (b, D) of every (N, D), summed over ranks, by one collective."""
    if resolve(group)[2] == 1:
        return d_texts
    mine = reduce_scatter_rows(torch.cat(list(d_texts), dim=1), counts, group)
    return mine.split([x.shape[1] for x in d_texts], dim=1)


def _alike(ids: Tensor) -> Tensor | None:
    """(N,) int32, equal where ids are; None where no two are, which spares the tiles their masks."""
    values, inverse = ids.unique(return_inverse=True)
    return inverse.int() if len(values) < len(ids) else None


def _pairs(rows: Rows, setting: Setting) -> list[Pairs]:
    """Every term's pairs."""
    _, rank, _ = resolve(setting.group)
    start = sum(rows.counts[:rank])
    own = slice(start, start + rows.counts[rank])
    counted = (rows.weight > 0).T.cpu()  # (terms, N): one transfer says how large every term is
    return [_pairs_of(rows, term, k, counted[k], own) for k, term in enumerate(setting.terms)]


def _pairs_of(rows: Rows, term: Term, k: int, counted: Tensor, own: slice) -> Pairs:
    image, text, weight = rows.images[term.image], rows.texts[term.text], rows.weight[:, k]
    if counted.all():
        return Pairs(image, text, weight, rows.alike, own, None, None)
    places = counted.nonzero()[:, 0].to(weight.device)
    own_places = counted[own].nonzero()[:, 0].to(weight.device)
    before = int(counted[: own.start].sum())
    alike = None if rows.alike is None else rows.alike[places]
    there = slice(before, before + len(own_places))
    return Pairs(image[own_places], text[places], weight[places], alike, there, places, own_places)


def _scores(pairs: Pairs, setting: Setting, scale: float) -> Scores:
    dtype = pairs.weight.dtype
    smooth = None
    if setting.smoothing:
        smooth = _smoothing(pairs, setting) * pairs.weight / pairs.candidates()
    image, text = pairs.image.detach().to(dtype), pairs.text.detach().to(dtype)
    return Scores(image, text, scale, pairs.own.start, setting.tile, pairs.alike, smooth)


def _smoothing(pairs: Pairs, setting: Setting) -> Tensor | float:
    """The share of a pair's target that is spread over all its candidates, its positive among them."""
    if not setting.softened:
        return setting.smoothing
    candidates = pairs.candidates()
    return torch.where(candidates > 1, setting.smoothing * candidates / (candidates - 1), 0.0)


def _kept_target(pairs: Pairs, setting: Setting) -> Tensor | float:
    """2 (1 - smoothing) of this rank's pairs: what the two directions leave on the positive alone."""
    smoothing = _smoothing(pairs, setting)
    if isinstance(smoothing, Tensor) and smoothing.dim():
        smoothing = smoothing[pairs.own]
    return 2 * (1 - smoothing)


def _share(pairs: Pairs, local: Normalisers, columns: Tensor, setting: Setting) -> Tensor:
    """() twice the loss of this rank's pairs, not yet divided by the weight."""
    per_pair = local.rows + columns[pairs.own] - _kept_target(pairs, setting) * local.positives
    return (pairs.weight[pairs.own] * per_pair).sum() - local.smoothed


def _gradients(scores: Scores, pairs: Pairs, found: Found, setting: Setting) -> tuple[Tensor, Tensor]:
    log_weight = pairs.weight.log()
    targets = _kept_target(pairs, setting) * pairs.weight[pairs.own]
    return gradients(scores, found.rows - log_weight[pairs.own], found.columns - log_weight, targets, found.shift)


def _over_ranks(columns: Sequence[Tensor], group: Group) -> Sequence[Tensor]:
    """Log-sum-exp of the terms' columns over ranks, by two reductions of N values a term: not W × N of memory."""
    if resolve(group)[2] == 1:
        return columns
    logs = torch.cat(list(columns))
    highest = all_reduce_max(logs.clone(), group)
    merged = all_reduce_sum((logs - highest).exp(), group).log() + highest
    return merged.split([len(column) for column in columns])


def _add(total: Tensor, part: Tensor, places: Tensor | None) -> None:
    if places is None:
        total += part
    else:
        total.index_add_(0, places, part)


def spread_rows(gradient: Tensor, kept: Tensor | None) -> Tensor:
    """(b, D) -> (B, D): rows that took no part get exactly 0."""
    if kept is None:
        return gradient
    full = gradient.new_zeros((kept.shape[0], *gradient.shape[1:]))
    full[kept] = gradient
    return full


def _dtype(*features: Tensor) -> torch.dtype:
    dtype = torch.float32
    for x in features:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype
