"""CLIP: image and caption of one sample attract, all others in the global batch repel (Radford et al., 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from pretrain.distributed.groups import Group
from pretrain.models.request import FeatureRequest
from pretrain.objectives.base import Features, Loss
from pretrain.objectives.functional import captions_loss
from pretrain.objectives.functional.dense import pair_losses
from pretrain.objectives.pieces.pairs import PairObjective, PairOptions

if TYPE_CHECKING:
    from pretrain.reader import Batch


class ClipOptions(PairOptions):
    """CLIP's own settings; the defaults are open_clip's."""

    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing."""


class Clip(PairObjective):
    """Symmetric cross-entropy over the global batch, with a learned temperature."""

    Options = ClipOptions
    options: ClipOptions
    image = FeatureRequest("image", "clip")

    def loss(self, features: Features, batch: Batch, group: Group) -> Loss:
        image, texts = self.unit(features)
        value = captions_loss(
            image,
            texts,
            self.logit_scale,
            ids=batch.uid,
            weight=torch.stack(self.weights(batch), dim=1),
            smoothing=self.options.smoothing,
            group=group,
        )
        return Loss(value, {"logit_scale": self.logit_scale.detach().exp()})

    def pair_losses(self, image: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        return pair_losses(image, text, self.logit_scale, ids, smoothing=self.options.smoothing)


OBJECTIVE = Clip
