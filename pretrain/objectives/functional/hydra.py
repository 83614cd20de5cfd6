"""Hydra's contrastive loss: any two classes may be positives, compared in a subspace that their gate opens.

An anchor of class y is told a partner class. Keys of the partner class are its positives, keys of neither class its
negatives; keys of its own class are neither, unless it is its own partner. Both forms of the gated similarity are
matrix products, so memory is B x N, never B x D x N. Which gate a pair of classes has is the objective's business.

Source: "Rethinking Positive Pairs in Contrastive Learning" (arXiv 2410.18200) and the authors' code.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.distributed.collectives import all_gather_rows, row_counts
from pretrain.distributed.groups import Group, resolve
from pretrain.objectives.functional.reduction import at_least_fp32, gather_rows, global_mean
from pretrain.philox import uniforms

Partners = Literal["arbitrary", "identical", "distinct"]
Form = Literal["gated_cosine", "gated_dot"]

FLOOR = 1e-12  # of norms


@torch.no_grad()
def hydra_partners(
    labels: Tensor,
    *,
    seed: int,
    step: int,
    mode: Partners = "arbitrary",
    num_classes: int | None = None,
    group: Group = None,
) -> Tensor:
    """(B,) int64 partner class of each of this rank's rows; -1 where a row has no label.

    labels: (B,) int64 of this rank, below 0 where there is none; B may differ over ranks and be 0. The answer depends
        on the global batch, `seed` and `step` alone, not on how rows are spread over ranks.
    mode: `arbitrary`: the labels of the global batch in a random order, so every partner is present; `identical`: the
        row's own class; `distinct`: one of the `num_classes` - 1 others at random, present or not.
    Raises ValueError for another mode, labels that are no vector, or `distinct` without two classes or more.
    """
    _check_partners(labels, mode, num_classes)
    if mode == "identical":
        return labels.clamp(min=-1)
    counts = row_counts(len(labels), labels.device, group)
    start = sum(counts[: resolve(group)[1]])
    mine = slice(start, start + len(labels))
    drawn = uniforms(seed, step, 0, range(sum(counts)), "hydra/partners", 1)[:, 0]
    draws = torch.from_numpy(drawn).to(labels.device)
    if mode == "distinct":
        assert num_classes is not None
        partner = (labels + 1 + (draws[mine] * (num_classes - 1)).long()) % num_classes
        return torch.where(labels >= 0, partner, -1)
    return _permuted(all_gather_rows(labels, group, counts), draws)[mine]


def _permuted(labels: Tensor, draws: Tensor) -> Tensor:
    """Labels in the order of `draws`, each place with a label getting one; no synchronisation with a GPU."""
    absent = labels < 0
    places = absent.long().argsort(stable=True)  # those with a label first, in order
    shuffled = (draws + 2 * absent).argsort(stable=True)  # likewise, in random order
    return torch.empty_like(labels).scatter_(0, places, labels[shuffled]).clamp(min=-1)


def hydra_loss(
    anchors: Tensor,
    keys: Tensor,
    gates: Tensor,
    labels: Tensor,
    partners: Tensor,
    *,
    key_labels: Tensor | None = None,
    self_pairs: bool = False,
    temperature: float | Tensor = 0.1,
    form: Form = "gated_cosine",
    group: Group = None,
) -> Tensor:
    """The loss, shape (): the mean of log(1 + Σ_n e^(l_in - l_ip)) over all positive pairs (i, p); 0 where none.

    n runs over the negatives of i, so each term has one positive in its denominator; l is `hydra_logits` divided by
    the temperature. Arguments as for `hydra_rows`.
    """
    rows = hydra_rows(
        anchors, keys, gates, labels, partners, key_labels=key_labels, self_pairs=self_pairs,
        temperature=temperature, form=form, group=group,
    )  # fmt: skip
    return global_mean(rows.losses.sum(), rows.positives.sum(), group)


class HydraRows(NamedTuple):
    """What each of this rank's anchors adds to the loss, all (B,)."""

    losses: Tensor  # summed over the anchor's positives, with a graph
    positives: Tensor  # how many it has
    negatives: Tensor


def hydra_rows(
    anchors: Tensor,
    keys: Tensor,
    gates: Tensor,
    labels: Tensor,
    partners: Tensor,
    *,
    key_labels: Tensor | None = None,
    self_pairs: bool = False,
    temperature: float | Tensor = 0.1,
    form: Form = "gated_cosine",
    group: Group = None,
) -> HydraRows:
    """Each anchor's part of `hydra_loss`, before the mean.

    anchors, keys, gates: (B, D), not normalised; gates in (0, 1), one an anchor. B may differ over ranks and be 0;
        keys are gathered here and get their gradients back.
    labels, partners: (B,) int64 classes of the anchors; a row with either below 0 takes no part, neither as anchor
        nor as key, whatever it holds (NaN too).
    key_labels: (K,) classes of the keys where they are not the anchors' rows, then `keys` is (K, D).
    self_pairs: `keys` are the anchors themselves (one view): a row is then no pair with itself.
    temperature: a number, or a tensor of one element that may be learned.
    Raises ValueError on shapes that do not fit, an unknown form, or `self_pairs` together with `key_labels`.
    """
    _check(anchors, keys, gates, labels, partners, key_labels, self_pairs, form)
    taking_part = (labels >= 0) & (partners >= 0)
    known = torch.where(taking_part, labels, -1) if key_labels is None else key_labels
    anchors, gates = (torch.where(taking_part[:, None], at_least_fp32(x), 0) for x in (anchors, gates))
    counts = row_counts(len(known), known.device, group)
    everyone = gather_rows(torch.where((known >= 0)[:, None], at_least_fp32(keys), 0), group, counts)
    theirs = all_gather_rows(known, group, counts)
    logits = hydra_logits(anchors, everyone, gates, form)
    logits = logits / (temperature.to(logits.dtype) if isinstance(temperature, Tensor) else temperature)
    positive, negative = _pairs(torch.where(taking_part, labels, -1), partners, theirs)
    if self_pairs:
        _leave_out_self(positive, sum(counts[: resolve(group)[1]]))
        _leave_out_self(negative, sum(counts[: resolve(group)[1]]))
    return HydraRows(_losses(logits, positive, negative), positive.sum(1), negative.sum(1))


def hydra_logits(anchors: Tensor, keys: Tensor, gates: Tensor, form: Form) -> Tensor:
    """(B, N) gated similarities of anchors (B, D), each through its gate (B, D), with keys (N, D); no temperature.

    `gated_cosine`: cos(g ⊙ z, g ⊙ k), two products; `gated_dot`: Σ g² ẑ k̂, the unit rows' product through the gate,
    one. Rows of zeros give zeros.
    """
    anchors, keys = F.normalize(anchors, dim=1, eps=FLOOR), F.normalize(keys, dim=1, eps=FLOOR)
    if form == "gated_dot":
        return _Products.apply(anchors * gates.square(), keys)
    # the cosine does not change with the size of a gate: the largest is brought to 1, so nearly closed ones are exact
    gates = gates / gates.detach().amax(1, keepdim=True).clamp(min=FLOOR) if gates.numel() else gates
    opened = gates.square()
    anchor_norm = (gates * anchors).square().sum(1, keepdim=True).clamp(min=FLOOR**2).sqrt()
    key_norm = _Products.apply(opened, keys.square()).clamp(min=FLOOR**2).sqrt()
    return _Products.apply(opened * anchors / anchor_norm, keys) / key_norm


class _Products(torch.autograd.Function):
    """a @ b.T in the inputs' precision, forward and backward, autocast or not."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with torch.autocast(a.device.type, enabled=False):
            return a @ b.T

    @staticmethod
    def backward(ctx, grad: Tensor):
        a, b = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            return grad @ b, grad.T @ a


def _pairs(labels: Tensor, partners: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N) bool: positives and negatives."""
    there = (labels >= 0)[:, None] & (theirs >= 0)[None]
    partner = partners[:, None] == theirs[None]
    own = labels[:, None] == theirs[None]
    return there & partner, there & ~partner & ~own


def _leave_out_self(pairs: Tensor, start: int) -> None:
    rows = torch.arange(len(pairs), device=pairs.device)
    pairs[rows, rows + start] = False


def _losses(logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """(B,) Σ over positives of softplus(logsumexp over negatives - logit)."""
    # finite in place of -inf: a row without negatives then has the loss 0 and the gradient 0, and no NaN on the way
    lowest = torch.finfo(logits.dtype).min / 4
    against = logits.masked_fill(~negative, lowest)
    against = against.logsumexp(1, keepdim=True) if logits.shape[1] else against.sum(1, keepdim=True)
    # logsigmoid is exact where softplus becomes linear beyond 20
    return (F.logsigmoid(logits - against).neg() * positive).sum(1)


def _check_partners(labels: Tensor, mode: str, num_classes: int | None) -> None:
    if labels.dim() != 1:
        raise ValueError(f"labels must be (B,), not {tuple(labels.shape)}")
    if mode not in ("arbitrary", "identical", "distinct"):
        raise ValueError(f"mode must be arbitrary, identical or distinct, not {mode!r}")
    if mode == "distinct" and (num_classes is None or num_classes < 2):
        raise ValueError(f"distinct partners need num_classes of 2 or more, not {num_classes}")


def _check(anchors, keys, gates, labels, partners, key_labels, self_pairs, form) -> None:
    if anchors.dim() != 2 or gates.shape != anchors.shape:
        raise ValueError(f"anchors and gates must both be (B, D), not {tuple(anchors.shape)} and {tuple(gates.shape)}")
    rows = len(anchors) if key_labels is None else len(key_labels)
    if keys.shape != (rows, anchors.shape[1]):
        raise ValueError(f"keys must be ({rows}, {anchors.shape[1]}), not {tuple(keys.shape)}")
    for name, values in (("labels", labels), ("partners", partners)):
        if values.shape != anchors.shape[:1]:
            raise ValueError(f"{name} must be one an anchor, shape ({len(anchors)},), not {tuple(values.shape)}")
    if self_pairs and key_labels is not None:
        raise ValueError("self_pairs means that the keys are the anchors: key_labels must then be None")
    if form not in ("gated_cosine", "gated_dot"):
        raise ValueError(f"form must be gated_cosine or gated_dot, not {form!r}")
