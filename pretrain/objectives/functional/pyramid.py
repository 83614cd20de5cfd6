"""PyramidCLIP's loss: six softened contrasts between three views of an image and three texts (Gao et al. 2022, §3.3).

All six are terms of one contrastive loss (`contrastive.py`): the three texts of all ranks are gathered in one go, what
the ranks know of the columns is merged in one go, and the memory grows with N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.distributed.groups import Group
from pretrain.objectives.functional.clip import tile_of
from pretrain.objectives.functional.contrastive import ContrastiveLoss, Setting, Term
from pretrain.objectives.functional.dense import pair_losses

IMAGES, TEXTS = ("global", "local", "regions"), ("summary", "text", "tags")


class Contrast(NamedTuple):
    """One of the six: its two features, and which of `weights` it has half of."""

    image: str
    text: str
    part: int

    @property
    def name(self) -> str:
        return f"{self.image}-{self.text}"


CONTRASTS = (
    Contrast("global", "summary", 0),  # peer: the views that tell as much as each other
    Contrast("local", "text", 0),
    Contrast("global", "tags", 1),  # across levels, of the whole image and of what sums it up
    Contrast("regions", "summary", 1),
    Contrast("local", "tags", 2),  # across levels, of the part and of what it is called
    Contrast("regions", "text", 2),
)


def pyramid_clip_loss(
    features: Mapping[str, Tensor],
    logit_scale: Tensor,
    *,
    softening: float = 0.2,
    weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3),
    present: Mapping[str, Tensor] | None = None,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    tile: int | None = None,
    group: Group = None,
) -> Tensor:
    """(1-λ-μ) (GS + LT)/2 + λ (GA + RS)/2 + μ (LA + RT)/2, each a softened symmetric InfoNCE (§3.3), shape ().

    features: (B, D) unit rows of `global`, `local`, `regions`, `summary`, `text`, `tags`; a feature that is not given
        (on all ranks) drops its terms.
    logit_scale: (1,), the log of the one factor on all cosines.
    softening: α; a query's target is 1 - α on its positive and α / (K - 1) on each of the other K - 1 candidates (the
        paper's notes print a target that sums to more than 1; this is the one that sums to 1). With no other
        candidate it is 1.
    weights: (1-λ-μ, λ, μ): of the peer terms, of those with the whole image, of those with its parts; each is halved
        over its two terms. They are constant: a term that is dropped makes no other one heavier.
    present: (B,) bool by feature; a row without a feature is absent from that feature's terms, as query and as
        candidate, whatever the feature holds, and N of those terms is the number of rows that are there.
    ids, weight, tile, group: as in `clip_loss`.

    Raises ValueError on unknown features, shapes that do not fit, or softening outside [0, 1).
    """
    return pyramid_losses(
        features,
        logit_scale,
        softening=softening,
        weights=weights,
        present=present,
        ids=ids,
        weight=weight,
        tile=tile,
        group=group,
    )[0]


def pyramid_losses(
    features: Mapping[str, Tensor],
    logit_scale: Tensor,
    *,
    softening: float,
    weights: Sequence[float],
    present: Mapping[str, Tensor] | None,
    ids: Tensor | None,
    weight: Tensor | None,
    tile: int | None = None,
    group: Group = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`pyramid_clip_loss`, and every term's own loss by name (`global-summary`, …), without gradient."""
    present = present or {}
    _check(features, logit_scale, softening, weights, present, ids, weight)
    chosen = _chosen(features, weights)
    some = next(iter(features.values()))
    if not chosen:
        return some[:0].sum(), {}  # 0, whatever the features hold, with a graph
    images = [name for name in IMAGES if any(c.image == name for c in chosen)]
    texts = [name for name in TEXTS if any(c.text == name for c in chosen)]
    terms = [Term(images.index(c.image), texts.index(c.text), weights[c.part] / 2) for c in chosen]
    setting = Setting(terms, softening, True, tile_of(tile, some), group)
    rows = _row_weights(chosen, present, weight, some)
    sides = [features[name] for name in images + texts]
    loss, losses = ContrastiveLoss.apply(setting, len(images), logit_scale, ids, rows, *sides)
    return loss, {c.name: one for c, one in zip(chosen, losses.unbind())}


@torch.no_grad()
def pyramid_sample_losses(
    features: Mapping[str, Tensor],
    logit_scale: Tensor,
    *,
    softening: float,
    weights: Sequence[float],
    present: Mapping[str, Tensor],
    ids: Tensor,
    weight: Tensor,
) -> Tensor:
    """(B,) each row's part of the loss of a batch that one process holds, B x B in memory: their mean over the rows of
    weight 1 is `pyramid_clip_loss`."""
    chosen = _chosen(features, weights)
    found = torch.zeros_like(weight, dtype=next(iter(features.values())).dtype)
    rows = _row_weights(chosen, present, weight, next(iter(features.values())))
    for contrast, own in zip(chosen, [] if rows is None else rows.unbind(1)):
        here = own > 0
        image, text = features[contrast.image][here], features[contrast.text][here]
        losses = pair_losses(image, text, logit_scale, ids[here], smoothing=softening, softened=True)
        found[here] += weights[contrast.part] / 2 * losses * (weight.sum() / own.sum())
    return found


def _chosen(features: Mapping[str, Tensor], weights: Sequence[float]) -> list[Contrast]:
    return [c for c in CONTRASTS if weights[c.part] and c.image in features and c.text in features]


def _row_weights(
    chosen: Sequence[Contrast], present: Mapping[str, Tensor], weight: Tensor | None, like: Tensor
) -> Tensor | None:
    """(B, terms): a row counts in a term when it has both of its features; None: all rows, everywhere, alike."""
    if weight is None and not present:
        return None
    own = torch.ones(len(like), device=like.device) if weight is None else weight.to(like.device)
    there = {name: rows.to(like.device, own.dtype) for name, rows in present.items()}
    return torch.stack([own * there.get(c.image, 1.0) * there.get(c.text, 1.0) for c in chosen], dim=1)


def _check(features, logit_scale, softening, weights, present, ids, weight) -> None:
    known = {*IMAGES, *TEXTS}
    if unknown := sorted((features.keys() | present.keys()) - known):
        raise ValueError(f"features are {', '.join((*IMAGES, *TEXTS))}, not {', '.join(unknown)}")
    shapes = {name: tuple(x.shape) for name, x in features.items()}
    if not shapes or len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"all features must be (B, D) of one shape, not {shapes}")
    if logit_scale.numel() != 1:
        raise ValueError(f"logit_scale must be one number, shape (1,), not {tuple(logit_scale.shape)}")
    if not 0 <= softening < 1:
        raise ValueError(f"softening must lie in [0, 1), not {softening}")
    if len(weights) != 3 or min(weights) < 0:
        raise ValueError(f"weights must be three numbers ≥ 0 (peer, cross-global, cross-local), not {tuple(weights)}")
    rows = next(iter(shapes.values()))[0]
    for name, x in {"ids": ids, "weight": weight, **{f"present[{n!r}]": p for n, p in present.items()}}.items():
        if x is not None and x.shape != (rows,):
            raise ValueError(f"{name} must be one a row, shape ({rows},), not {tuple(x.shape)}")
    if weight is not None and bool((weight < 0).any()):
        raise ValueError(f"weight must be ≥ 0, but row {int(weight.argmin())} has {float(weight.min())}")
