"""SwAV: crops of one image predict each other's balanced assignment to prototypes (Caron et al., 2020).

As the official code: all crops through the head in one BatchNorm batch, prototypes without bias and of unit length
before every step, assignments over the global batch (and the queue) at epsilon, predictions at temperature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.distributed.collectives import all_reduce_sum
from pretrain.distributed.groups import LOCAL, Group
from pretrain.models.request import FeatureRequest
from pretrain.objectives.base import Features, Loss, Objective, RunFacts
from pretrain.objectives.functional.reduction import at_least_fp32, global_mean
from pretrain.objectives.functional.swav import swav_assignments, swav_rows
from pretrain.objectives.pieces.crops import Crops, ViewOptions, counted
from pretrain.objectives.pieces.queue import RowQueue, present
from pretrain.views.spec import ImageView

if TYPE_CHECKING:
    from pretrain.reader import Batch


class SwavOptions(ViewOptions):
    """SwAV's own settings; the defaults are the official ImageNet recipe's."""

    crops: list[Crops] = Field(default=[(2, None, (0.14, 1.0)), (6, 96, (0.05, 0.14))], min_length=1)
    """`[count, side or null, [area from, to]]` of every kind."""
    assign: list[int] = Field(default=[0, 1], min_length=1)
    """Which crops are assigned to prototypes, for all others to predict."""
    prototypes: int = Field(default=3000, ge=2)
    """Rule of thumb: ten times the number of classes one would hope for."""
    hidden: int = Field(default=2048, ge=1)
    dim: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.1, gt=0)
    epsilon: float = Field(default=0.05, gt=0)
    """Sharpness of the assignment; lower (0.03) against collapse."""
    iterations: int = Field(default=3, ge=1)
    freeze_steps: int = Field(default=313, ge=0)
    """Steps at the start in which prototypes are not trained; official: one epoch."""
    queue: int = Field(default=0, ge=0)
    """Older embeddings, over all ranks, that share the assignment: for batches below 4 x prototypes or so."""
    queue_from_step: int = Field(default=0, ge=0)
    """The queue fills from here and is used once full."""

    @model_validator(mode="after")
    def _fits(self) -> SwavOptions:
        total = sum(count for count, _, _ in self.crops)
        if total < 2 or not all(0 <= i < total for i in self.assign) or len(set(self.assign)) < len(self.assign):
            raise ValueError(f"assign {self.assign} must name crops among the {total} there are (2 or more), each once")
        return self


class Swav(Objective):
    """Swapped prediction over multi-crop views."""

    Options = SwavOptions
    options: SwavOptions
    last_best: Tensor

    def __init__(self, options: SwavOptions, facts: RunFacts) -> None:
        super().__init__(options, facts)
        self.head = nn.Sequential(
            nn.Linear(facts.pooled_dim, options.hidden),
            nn.BatchNorm1d(options.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(options.hidden, options.dim),
        )
        self.prototypes = nn.Parameter(F.normalize(torch.randn(options.prototypes, options.dim), dim=1))
        self.queue = None
        if options.queue:
            self.queue = RowQueue(
                "objectives.swav.queue", rows=options.queue, global_batch=facts.global_batch, dim=options.dim,
                rank=facts.rank, world=facts.world, kinds=len(options.assign),
            )  # fmt: skip
        # the step at which each prototype was last some row's best
        self.register_buffer("last_best", torch.zeros(options.prototypes, dtype=torch.int64))
        self._crops = sum(count for count, _, _ in options.crops)

    def image_views(self, size: int) -> list[ImageView]:
        crops = counted(self.options.crops, size)
        return [self.options.view(f"swav/{i}", side, scale) for i, (side, scale) in enumerate(crops)]

    def requests(self) -> list[FeatureRequest]:
        return [FeatureRequest("image", f"swav/{i}", "pooled") for i in range(self._crops)]

    def before_step(self, step: int) -> None:
        self.prototypes.requires_grad_(step >= self.options.freeze_steps)
        with torch.no_grad():
            self.prototypes.copy_(F.normalize(self.prototypes, dim=1))

    def loss(self, features: Features, batch: Batch, group: Group) -> Loss:
        z, scores = self._scores(features)
        assignments = self._assignments(scores, batch, group)
        rows = self._rows(scores, assignments, batch)
        value = global_mean(rows.sum(), batch.weight.sum(), group)
        self._remember(z, batch)
        return Loss(value, self._signals(value.detach(), assignments, batch, group))

    @torch.no_grad()
    def sample_losses(self, features: Features, batch: Batch) -> Tensor:
        _, scores = self._scores(features)
        return self._rows(scores, self._assignments(scores, batch, LOCAL), batch)

    def warnings(self, figures: Mapping[str, float], step: int) -> list[str]:
        lines = []
        if figures["loss_over_chance"] > 0.998 and step >= 2 * self.options.freeze_steps + 200:
            queue = "; a shorter or later queue, if it rose when that began" if self.queue else ""
            lines.append(
                "the loss stays at ln(prototypes): every crop predicts the uniform assignment. Try epsilon 0.03, "
                f"a longer freeze_steps, fewer prototypes, weaker jitter, a lower optimizer.lr{queue}"
            )
        if figures["dead_prototypes"] > 0.5 and step > self._patience:
            lines.append(
                f"more than half of the prototypes were no sample's best for {self._patience} steps: "
                "use fewer, a queue, or a larger batch"
            )
        if figures["marginal_error"] > 0.5 and self.queue is None:  # with one, the batch alone need not be even
            lines.append(
                f"prototypes are far from equal use after {self.options.iterations} Sinkhorn iterations: raise "
                "iterations or epsilon"
            )
        return lines

    def _scores(self, features: Features) -> tuple[Tensor, list[Tensor]]:
        """Unit embeddings (V, b, dim) and their cosines with the prototypes, (b, K) a crop."""
        pooled = torch.cat([at_least_fp32(features[r]) for r in self.requests()])
        z = F.normalize(self.head(pooled), dim=1)
        return z.view(self._crops, -1, self.options.dim), list((z @ self.prototypes.T).chunk(self._crops))

    def _assignments(self, scores: list[Tensor], batch: Batch, group: Group) -> Tensor:
        """(A, b, K) of the assigning crops."""
        return swav_assignments(
            [scores[i] for i in self.options.assign],
            epsilon=self.options.epsilon,
            iterations=self.options.iterations,
            queue_scores=self._queue_scores(batch.step),
            weight=batch.weight,
            group=group,
        )

    def _rows(self, scores: list[Tensor], assignments: Tensor, batch: Batch) -> Tensor:
        options = self.options
        return swav_rows(
            scores, assignments, assign=options.assign, temperature=options.temperature, weight=batch.weight
        )

    @torch.no_grad()
    def _queue_scores(self, step: int) -> list[Tensor] | None:
        """The queue's rows under the present prototypes; None while it is not used."""
        if self.queue is None or not self.queue.full(step - self.options.queue_from_step):
            return None
        rows = [self.queue.rows(kind) for kind in range(len(self.options.assign))]
        return [(r @ self.prototypes.T).masked_fill(~present(r)[:, None], -torch.inf) for r in rows]

    def _remember(self, z: Tensor, batch: Batch) -> None:
        pushes = batch.step - self.options.queue_from_step
        if self.queue is not None and pushes >= 0:
            kept = (batch.weight > 0)[:, None]  # not a product: a damaged row may hold NaN
            self.queue.push(z.detach()[self.options.assign].masked_fill(~kept, 0.0), pushes)

    @property
    def _patience(self) -> int:
        """Steps in which a prototype in fair use would be best ten times over."""
        return math.ceil(10 * self.options.prototypes / (self.facts.global_batch * len(self.options.assign)))

    @torch.no_grad()
    def _signals(self, loss: Tensor, assignments: Tensor, batch: Batch, group: Group) -> dict[str, Tensor | float]:
        """Figures over the global batch, by one reduction of 2 K + 2 numbers."""
        k = self.options.prototypes
        present_rows = (batch.weight > 0).to(assignments.dtype)
        highest, best = assignments.max(dim=2)  # (A, b)
        chosen = torch.zeros(k, dtype=assignments.dtype, device=loss.device)
        chosen.index_add_(0, best.flatten(), present_rows.repeat(len(assignments)))
        confidence = (highest * present_rows).sum()
        count = present_rows.sum() * len(assignments)
        packed = all_reduce_sum(torch.cat([assignments.sum((0, 1)), chosen, confidence[None], count[None]]), group)
        count = packed[-1].clamp(min=1)
        use = packed[:k] / count
        self.last_best[packed[k : 2 * k] > 0] = batch.step
        return {
            "loss_over_chance": loss / math.log(k),
            "use_entropy": torch.special.entr(use).sum() / math.log(k),
            "dead_prototypes": (batch.step - self.last_best > self._patience).float().mean(),
            "confidence": packed[-2] / count,
            "marginal_error": (k * use - 1).abs().mean(),
        }


OBJECTIVE = Swav
