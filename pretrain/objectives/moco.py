"""MoCo v2: a query finds its key, made by a momentum teacher from another crop, among a queue of older keys.

He et al. 2020 (MoCo), Chen et al. 2020 (v2: MLP head, blur). The teacher runs without batch statistics
(`MomentumCopy`), which is what shuffling BatchNorm was for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.distributed.collectives import all_gather_rows, all_reduce_sum
from pretrain.distributed.groups import Group, resolve
from pretrain.models.momentum import MomentumCopy
from pretrain.models.request import FeatureRequest
from pretrain.objectives.base import Features, Loss, Objective, RunFacts
from pretrain.objectives.functional.reduction import at_least_fp32, global_mean
from pretrain.objectives.pieces.crops import ViewOptions
from pretrain.objectives.pieces.queue import RowQueue, present
from pretrain.views.spec import ImageView

if TYPE_CHECKING:
    from pretrain.reader import Batch


class MocoOptions(ViewOptions):
    """MoCo v2's own settings, as published."""

    size: int | None = Field(default=None, ge=1)
    """Side of the crops; null: the trunk's."""
    scale: tuple[float, float] = (0.2, 1.0)
    jitter: tuple[float, float, float, float] | None = (0.4, 0.4, 0.4, 0.1)
    queue: int = Field(default=65536, ge=1)
    """Keys, over all ranks; a multiple of the global batch. Places not yet filled are no negatives."""
    dim: int = Field(default=128, ge=1)
    hidden: int = Field(default=2048, ge=1)
    temperature: float = Field(default=0.2, gt=0)
    momentum: float = Field(default=0.999, ge=0, le=1)


class Moco(Objective):
    """InfoNCE over one positive key and a queue of negatives."""

    Options = MocoOptions
    options: MocoOptions
    query = FeatureRequest("image", "moco/0", "pooled")
    key = FeatureRequest("image", "moco/1", "pooled", teacher=True)

    def __init__(self, options: MocoOptions, facts: RunFacts) -> None:
        super().__init__(options, facts)
        self.head = nn.Sequential(
            nn.Linear(facts.pooled_dim, options.hidden), nn.ReLU(inplace=True), nn.Linear(options.hidden, options.dim)
        )
        self.key_head = MomentumCopy(self.head)
        self.queue = RowQueue(
            "objectives.moco.queue", rows=options.queue, global_batch=facts.global_batch, dim=options.dim
        )

    def image_views(self, size: int) -> list[ImageView]:
        options = self.options
        return [options.view(f"moco/{i}", options.size or size, options.scale) for i in range(2)]

    def requests(self) -> list[FeatureRequest]:
        return [self.query, self.key]

    def teacher_momentum(self, step: int) -> float:
        return self.options.momentum

    def loss(self, features: Features, batch: Batch, group: Group) -> Loss:
        logits, keys = self._logits(features, batch)
        rows = self._rows(logits, batch)
        value = global_mean(rows.sum(), batch.weight.sum(), group)
        counts = [len(keys)] * resolve(group)[2]  # the trainer's ranks have equal shares
        self._new_keys = all_gather_rows(keys, group, counts)[None]
        return Loss(value, self._signals(logits, batch, group))

    @torch.no_grad()
    def sample_losses(self, features: Features, batch: Batch) -> Tensor:
        return self._rows(self._logits(features, batch)[0], batch)

    def after_step(self, step: int) -> None:
        self.queue.push(self._new_keys, step)  # not before: the gradient is taken through the older keys
        self.key_head.update(self.head, self.options.momentum, step)

    def warnings(self, figures: Mapping[str, float], step: int) -> list[str]:
        if figures["positive"] > 0.999 and figures["accuracy"] < 0.01 and step > 100:
            return ["all embeddings are nearly one point: lower optimizer.lr, or set optimizer.clip_norm"]
        return []

    def _logits(self, features: Features, batch: Batch) -> tuple[Tensor, Tensor]:
        """(b, 1 + queue) scores, the positive first, and this rank's keys (b, dim), zeros for damaged rows."""
        q = F.normalize(self.head(at_least_fp32(features[self.query])), dim=1)
        k = F.normalize(self.key_head(at_least_fp32(features[self.key])), dim=1)
        older = self.queue.rows()
        negatives = (q @ older.T).masked_fill(~present(older), -torch.inf)
        logits = torch.cat([(q * k).sum(1, keepdim=True), negatives], dim=1) / self.options.temperature
        return logits, k.masked_fill((batch.weight <= 0)[:, None], 0.0)

    def _rows(self, logits: Tensor, batch: Batch) -> Tensor:
        """(b,) each row's cross-entropy; 0 for damaged rows, whatever they hold."""
        logits = logits.masked_fill((batch.weight <= 0)[:, None], 0.0)
        return (logits.logsumexp(1) - logits[:, 0]) * batch.weight

    @torch.no_grad()
    def _signals(self, logits: Tensor, batch: Batch, group: Group) -> dict[str, Tensor | float]:
        """Share of queries that find their key first, and the mean cosine with it, over the global batch."""
        found = (logits[:, 0] > logits[:, 1:].amax(1)).to(logits.dtype)
        figures = torch.stack([found, logits[:, 0] * self.options.temperature, torch.ones_like(found)])
        sums = all_reduce_sum(figures.masked_fill(batch.weight <= 0, 0.0).sum(1), group)
        accuracy, positive = (sums[:2] / sums[2].clamp(min=1)).unbind()
        return {"accuracy": accuracy, "positive": positive}


OBJECTIVE = Moco
