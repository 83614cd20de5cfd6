"""SupCon (Khosla et al. 2020, arXiv 2004.11362) as a plug-in objective: `objectives: {benchmarks.learning.supcon: …}`.

L_out of the paper: every view of an image attracts all other views of its class, each positive in a logarithm of its
own whose denominator holds all other views. Two views, projection of two layers, temperature 0.1, as published.
It stands here as Hydra's peer, and shows that an objective of one's own is one file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.distributed.collectives import all_gather_rows
from pretrain.distributed.groups import LOCAL, Group, resolve
from pretrain.models.request import FeatureRequest
from pretrain.objectives.base import Features, Loss, Objective, RunFacts
from pretrain.objectives.functional.reduction import at_least_fp32, gather_rows, global_mean
from pretrain.objectives.pieces.crops import ViewOptions
from pretrain.views.spec import ImageView

if TYPE_CHECKING:
    from pretrain.reader import Batch


class SupConOptions(ViewOptions):
    """SupCon's own settings."""

    scale: tuple[float, float] = (0.2, 1.0)
    hidden: int = Field(default=2048, ge=1)
    dim: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.1, gt=0)


class SupCon(Objective):
    """Views of one class attract, of all others repel."""

    Options = SupConOptions
    options: SupConOptions
    views = (FeatureRequest("image", "supcon/0", "pooled"), FeatureRequest("image", "supcon/1", "pooled"))

    def __init__(self, options: SupConOptions, facts: RunFacts) -> None:
        super().__init__(options, facts)
        self.head = nn.Sequential(
            nn.Linear(facts.pooled_dim, options.hidden), nn.ReLU(inplace=True), nn.Linear(options.hidden, options.dim)
        )

    def image_views(self, size: int) -> list[ImageView]:
        return [self.options.view(request.view, size, self.options.scale) for request in self.views]

    def requests(self) -> list[FeatureRequest]:
        return list(self.views)

    def loss(self, features: Features, batch: Batch, group: Group) -> Loss:
        rows = self._rows(features, batch, group)
        return Loss(global_mean(rows.sum(), (_labels(batch) >= 0).sum(), group))

    @torch.no_grad()
    def sample_losses(self, features: Features, batch: Batch) -> Tensor:
        return self._rows(features, batch, LOCAL)

    def _rows(self, features: Features, batch: Batch, group: Group) -> Tensor:
        """(b,) mean of both views' losses; 0 for a row that has no label or is damaged."""
        labels = _labels(batch).repeat(2)
        pooled = torch.cat([at_least_fp32(features[r]) for r in self.views])
        z = F.normalize(self.head(torch.where(labels[:, None] >= 0, pooled, 0)), dim=1)
        first = resolve(group)[1] * len(z)
        losses = _losses(z, gather_rows(z, group), labels, all_gather_rows(labels, group), first, self.options)
        return losses.view(2, -1).mean(0)


def _losses(z: Tensor, keys: Tensor, labels: Tensor, theirs: Tensor, first: int, options: SupConOptions) -> Tensor:
    """(B,) L_out of each view; `first` is the place of z's first row among `keys`."""
    own = torch.arange(len(z), device=z.device)[:, None] + first == torch.arange(len(keys), device=z.device)
    logits = (z @ keys.T / options.temperature).masked_fill(own | (theirs < 0), -torch.inf)
    positive = (labels[:, None] == theirs) & ~own & (labels[:, None] >= 0)
    terms = (logits.logsumexp(1, keepdim=True) - logits).masked_fill(~positive, 0)
    return terms.sum(1) / positive.sum(1).clamp(min=1)


def _labels(batch: Batch) -> Tensor:
    return torch.where(batch.weight > 0, batch.labels, -1).clamp(min=-1)


OBJECTIVE = SupCon
