"""CLIP: image and caption of one sample attract, all others in the global batch repel (Radford et al., 2021)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.distributed.groups import Group
from pretrain.models.request import FeatureRequest
from pretrain.objectives.base import Features, Loss, Objective, ObjectiveOptions, RunFacts
from pretrain.objectives.functional import clip_loss
from pretrain.objectives.functional.reduction import at_least_fp32
from pretrain.views.spec import ImageView, TextView

if TYPE_CHECKING:
    from pretrain.reader import Batch


class ClipOptions(ObjectiveOptions):
    """CLIP's own settings; the defaults are open_clip's."""

    scale: tuple[float, float] = (0.9, 1.0)
    """Area of the random crop, as a share of the image."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a horizontal flip; 0 because captions may say left and right."""
    temperature: float = Field(default=0.07, gt=0)
    """Temperature at the start; learned from there."""
    max_logit_scale: float = Field(default=100.0, gt=1)
    """Upper bound of the learned scale (1 / temperature)."""
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing."""


class Clip(Objective):
    """Symmetric cross-entropy over the global batch, with a learned temperature."""

    Options = ClipOptions
    options: ClipOptions
    image = FeatureRequest("image", "clip")
    text = FeatureRequest("text", "caption")

    def __init__(self, options: ClipOptions, facts: RunFacts) -> None:
        super().__init__(options, facts)
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(options.temperature)]))

    def image_views(self, size: int) -> list[ImageView]:
        return [ImageView("clip", size, scale=self.options.scale, flip=self.options.flip)]

    def text_views(self) -> list[TextView]:
        return [TextView("caption")]

    def requests(self) -> list[FeatureRequest]:
        return [self.image, self.text]

    def loss(self, features: Features, batch: Batch, group: Group) -> Loss:
        image, text = self._unit(features)
        value = clip_loss(
            image,
            text,
            self.logit_scale,
            ids=batch.uid,
            weight=batch.weight,
            smoothing=self.options.smoothing,
            group=group,
        )
        return Loss(value, {"logit_scale": self.logit_scale.detach().exp()})

    def sample_losses(self, features: Features, batch: Batch) -> Tensor:
        image, text = self._unit(features)
        logits = self.logit_scale.exp() * image @ text.T
        # equal ids and damaged rows are no negatives, as in clip_loss
        same = batch.uid[:, None] == batch.uid[None]
        absent = (same | (batch.weight == 0)[None]) & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
        logits_text = logits.T.masked_fill(absent, -torch.inf)
        logits = logits.masked_fill(absent, -torch.inf)
        target = torch.arange(len(logits), device=logits.device)
        both = [F.cross_entropy(x, target, reduction="none") for x in (logits, logits_text)]
        return (both[0] + both[1]) / 2 * (batch.weight > 0)

    def after_step(self, step: int) -> None:
        with torch.no_grad():
            self.logit_scale.clamp_(0, math.log(self.options.max_logit_scale))

    def _unit(self, features: Features) -> tuple[Tensor, Tensor]:
        return tuple(F.normalize(at_least_fp32(features[r]), dim=-1) for r in (self.image, self.text))  # type: ignore[return-value]


OBJECTIVE = Clip
