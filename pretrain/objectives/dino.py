"""DINO: every crop predicts what a momentum teacher, centred and sharpened, says of the large ones.

Caron et al. 2021, and its official code; the teacher runs in evaluation mode (`MomentumCopy`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.distributed.collectives import all_reduce_sum
from pretrain.distributed.groups import Group
from pretrain.models.momentum import MomentumCopy
from pretrain.models.request import FeatureRequest
from pretrain.objectives.base import Features, Loss, Objective, RunFacts
from pretrain.objectives.functional.reduction import at_least_fp32, global_mean
from pretrain.objectives.pieces.crops import Crops, ViewOptions, counted
from pretrain.views.spec import ImageView

if TYPE_CHECKING:
    from pretrain.reader import Batch


class DinoOptions(ViewOptions):
    """DINO's own settings; the defaults are the official ViT-S/16 recipe's."""

    crops: list[Crops] = Field(default=[(2, None, (0.4, 1.0)), (8, 96, (0.05, 0.4))], min_length=1)
    """`[count, side or null, [area from, to]]` of every kind; the teacher sees the first kind."""
    jitter: tuple[float, float, float, float] | None = (0.4, 0.4, 0.2, 0.1)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    blurs: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Chance of a blur of the first crop, of the other large ones, of the small ones; in place of `blur`."""
    solarize: float = Field(default=0.2, ge=0, le=1)
    """Chance of the second large crop to be solarised."""
    prototypes: int = Field(default=65536, ge=2)
    """Outputs of the head."""
    hidden: int = Field(default=2048, ge=1)
    bottleneck: int = Field(default=256, ge=1)
    student_temperature: float = Field(default=0.1, gt=0)
    teacher_temperature: float = Field(default=0.04, gt=0)
    teacher_temperature_start: float | None = Field(default=None, gt=0)
    """Where the teacher's temperature begins; null: where it ends."""
    teacher_temperature_warmup_steps: int = Field(default=0, ge=0)
    momentum: float = Field(default=0.996, ge=0, le=1)
    momentum_final: float = Field(default=1.0, ge=0, le=1)
    """Reached at the last step by half a cosine."""
    center_momentum: float = Field(default=0.9, ge=0, lt=1)
    freeze_steps: int = Field(default=1251, ge=0)
    """Steps at the start in which the last layer is not trained; official: one epoch."""

    @model_validator(mode="after")
    def _fits(self) -> DinoOptions:
        if sum(count for count, _, _ in self.crops) < 2:
            raise ValueError("crops: two or more are needed, so that one can predict another")
        return self


class Head(nn.Module):
    """Linear, GELU, twice; linear to a unit bottleneck; cosine with unit prototypes (weight norm of gain 1)."""

    def __init__(self, pooled: int, options: DinoOptions) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(pooled, options.hidden), nn.GELU(),
            nn.Linear(options.hidden, options.hidden), nn.GELU(),
            nn.Linear(options.hidden, options.bottleneck),
        )  # fmt: skip
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        # their length does not count, but how fast they turn goes as lr / length: the official one is nn.Linear's own
        last = nn.Linear(options.bottleneck, options.prototypes, bias=False)
        self.prototypes = nn.Parameter(last.weight.detach().clone())

    def forward(self, pooled: Tensor) -> Tensor:
        return F.normalize(self.mlp(pooled), dim=1) @ F.normalize(self.prototypes, dim=1).T


class Dino(Objective):
    """Self-distillation without labels over multi-crop views."""

    Options = DinoOptions
    options: DinoOptions
    center: Tensor

    def __init__(self, options: DinoOptions, facts: RunFacts) -> None:
        super().__init__(options, facts)
        self.head = Head(facts.pooled_dim, options)
        self.teacher_head = MomentumCopy(self.head)
        self.register_buffer("center", torch.zeros(options.prototypes))
        self._crops = sum(count for count, _, _ in options.crops)
        self._large = options.crops[0][0]

    def image_views(self, size: int) -> list[ImageView]:
        options, views = self.options, []
        for i, (side, scale) in enumerate(counted(options.crops, size)):
            blur = options.blurs[0 if i == 0 else 1 if i < self._large else 2]
            solarize = options.solarize if i == 1 < self._large else 0.0
            views.append(options.view(f"dino/{i}", side, scale, blur=blur, solarize=solarize))
        return views

    def requests(self) -> list[FeatureRequest]:
        return self._student() + self._teacher()

    def teacher_momentum(self, step: int) -> float:
        o = self.options
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.facts.total_steps))
        return o.momentum_final - (o.momentum_final - o.momentum) * cosine

    def before_step(self, step: int) -> None:
        self.head.prototypes.requires_grad_(step >= self.options.freeze_steps)

    def loss(self, features: Features, batch: Batch, group: Group) -> Loss:
        student, taught = self._outputs(features)
        targets = self._targets(taught, batch.step)
        rows = self._rows(student, targets, batch)
        value = global_mean(rows.sum(), batch.weight.sum(), group)
        signals = self._signals(value.detach(), targets, batch, group)
        self._follow(taught, batch, group)  # after the loss, as the official code
        return Loss(value, signals)

    @torch.no_grad()
    def sample_losses(self, features: Features, batch: Batch) -> Tensor:
        student, taught = self._outputs(features)
        return self._rows(student, self._targets(taught, batch.step), batch)

    def after_step(self, step: int) -> None:
        self.teacher_head.update(self.head, self.teacher_momentum(step), step)

    def warnings(self, figures: Mapping[str, float], step: int) -> list[str]:
        lines, enough = [], step >= 2 * self.options.freeze_steps + 200
        if figures["teacher_entropy"] > 0.99 and enough:
            lines.append("the teacher says the same of every class: lower teacher_temperature")
        if figures["teacher_use"] < 0.1 and enough:
            lines.append("the teacher says one class of every image: a higher center_momentum or lower optimizer.lr")
        return lines

    def _student(self) -> list[FeatureRequest]:
        return [FeatureRequest("image", f"dino/{i}", "pooled") for i in range(self._crops)]

    def _teacher(self) -> list[FeatureRequest]:
        return [FeatureRequest("image", f"dino/{i}", "pooled", teacher=True) for i in range(self._large)]

    def _outputs(self, features: Features) -> tuple[Tensor, Tensor]:
        """Scores (V, b, K) of the student and (G, b, K) of the teacher."""
        student = self.head(torch.cat([at_least_fp32(features[r]) for r in self._student()]))
        taught = self.teacher_head(torch.cat([at_least_fp32(features[r]) for r in self._teacher()]))
        k = self.options.prototypes
        return student.view(self._crops, -1, k), taught.view(self._large, -1, k)

    def _targets(self, taught: Tensor, step: int) -> Tensor:
        """(G, b, K) the teacher's distributions."""
        return ((taught - self.center) / self.teacher_temperature(step)).softmax(dim=-1)

    def teacher_temperature(self, step: int) -> float:
        """At 0-based `step`: a straight line from its start, as np.linspace has it, then constant."""
        o = self.options
        if step >= o.teacher_temperature_warmup_steps or o.teacher_temperature_start is None:
            return o.teacher_temperature
        share = step / max(1, o.teacher_temperature_warmup_steps - 1)
        return o.teacher_temperature_start + (o.teacher_temperature - o.teacher_temperature_start) * share

    def _rows(self, student: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        """(b,) mean cross-entropy of a row over the pairs (large crop, other crop)."""
        absent = (batch.weight <= 0)[:, None]
        log_p = F.log_softmax((student / self.options.student_temperature).masked_fill(absent, 0.0), dim=-1)
        everyone = targets.masked_fill(absent, 0.0)
        total = everyone.sum(0)
        rows = [-((total - everyone[v] if v < self._large else total) * log_p[v]).sum(-1) for v in range(self._crops)]
        return torch.stack(rows).sum(0) / (self._large * (self._crops - 1)) * batch.weight

    @torch.no_grad()
    def _follow(self, taught: Tensor, batch: Batch, group: Group) -> None:
        """center <- m · center + (1 - m) · the teacher's global mean score."""
        rows = taught.masked_fill((batch.weight <= 0)[:, None], 0.0).sum((0, 1))
        packed = all_reduce_sum(torch.cat([rows, batch.weight.sum()[None].to(rows.dtype) * self._large]), group)
        mean = packed[:-1] / packed[-1].clamp(min=1)
        speed = (1 - self.options.center_momentum) * (packed[-1] > 0)  # a batch without a good row moves nothing
        self.center.lerp_(mean.to(self.center.dtype), speed.to(self.center.dtype))

    @torch.no_grad()
    def _signals(self, loss: Tensor, targets: Tensor, batch: Batch, group: Group) -> dict[str, Tensor | float]:
        """Entropy of a row's target (sharpness) and of the mean target (use), as shares of ln K."""
        chance = math.log(self.options.prototypes)
        targets = targets.masked_fill((batch.weight <= 0)[:, None], 0.0)
        entropy, count = torch.special.entr(targets).sum(), batch.weight.sum().to(targets.dtype) * self._large
        packed = all_reduce_sum(torch.cat([targets.sum((0, 1)), entropy[None], count[None]]), group)
        count = packed[-1].clamp(min=1)
        return {
            "loss_over_chance": loss / chance,
            "teacher_entropy": packed[-2] / count / chance,
            "teacher_use": torch.special.entr(packed[:-2] / count).sum() / chance,
            "teacher_temperature": self.teacher_temperature(batch.step),
        }


OBJECTIVE = Dino
