"""SigLIP: of every image and text of the global batch, do they belong together? (Zhai et al., 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.distributed.groups import Group
from pretrain.models.request import FeatureRequest
from pretrain.objectives.base import Features, Loss, RunFacts
from pretrain.objectives.functional import siglip_loss
from pretrain.objectives.functional.dense import sigmoid_pair_losses
from pretrain.objectives.pieces.pairs import PairObjective, PairOptions

if TYPE_CHECKING:
    from pretrain.reader import Batch


class SiglipOptions(PairOptions):
    """SigLIP's own settings; the defaults are the paper's."""

    temperature: float = Field(default=0.1, gt=0)
    """Temperature at the start, 1 / t of the paper; learned from there."""
    bias: float = -10.0
    """Bias of the logits at the start: nearly all pairs do not belong together. Learned from there."""


class Siglip(PairObjective):
    """Sigmoid loss over the global batch, with a learned temperature and bias."""

    Options = SiglipOptions
    options: SiglipOptions
    image = FeatureRequest("image", "siglip")

    def __init__(self, options: SiglipOptions, facts: RunFacts) -> None:
        super().__init__(options, facts)
        self.logit_bias = nn.Parameter(torch.tensor([options.bias]))

    def loss(self, features: Features, batch: Batch, group: Group) -> Loss:
        image, texts = self.unit(features)
        terms = [
            siglip_loss(image, text, self.logit_scale, self.logit_bias, ids=batch.uid, weight=weight, group=group)
            for text, weight in zip(texts, self.weights(batch))
        ]
        temperature = {"logit_scale": self.logit_scale.detach().exp(), "logit_bias": self.logit_bias.detach()}
        return Loss(torch.stack(terms).mean(), {**temperature})

    def pair_losses(self, image: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        return sigmoid_pair_losses(image, text, self.logit_scale, self.logit_bias, ids)


OBJECTIVE = Siglip
