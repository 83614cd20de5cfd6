"""What CLIP and SigLIP have in common: one crop of an image, its captions, a learned temperature."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.models.request import FeatureRequest
from pretrain.objectives.base import Features, Objective, ObjectiveOptions, RunFacts
from pretrain.objectives.functional.reduction import at_least_fp32
from pretrain.views.spec import ImageView, TextView

if TYPE_CHECKING:
    from pretrain.reader import Batch


class PairOptions(ObjectiveOptions):
    """Crop, captions and temperature."""

    scale: tuple[float, float] = (0.9, 1.0)
    """Area of the random crop, as a share of the image."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a horizontal flip; 0 because captions may say left and right."""
    captions: int = Field(default=1, ge=1)
    """Captions of an image that are its positives at once, drawn without repetition; each is a term of its own."""
    temperature: float = Field(default=0.07, gt=0)
    """Temperature at the start; learned from there."""
    max_logit_scale: float = Field(default=100.0, gt=1)
    """Upper bound of the learned scale (1 / temperature)."""


class PairObjective(Objective):
    """An objective on images and their captions.

    Of k captions an image each is set against the images on its own, and the loss is the mean over the k; an image
    without an n-th caption is absent from the n-th term. So no two captions of one image ever meet in one term, where
    one would be the other's negative; and, as everywhere, neither do two rows of one sample.
    """

    options: PairOptions
    image: FeatureRequest
    """Set by the subclass; its view is the objective's own."""
    text = FeatureRequest("text", "caption")

    def __init__(self, options: PairOptions, facts: RunFacts) -> None:
        super().__init__(options, facts)
        self.texts = [FeatureRequest("text", view.name) for view in self.text_views()]
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(options.temperature)]))

    def image_views(self, size: int) -> list[ImageView]:
        return [ImageView(self.image.view, size, scale=self.options.scale, flip=self.options.flip)]

    def text_views(self) -> list[TextView]:
        first = TextView(self.text.view)
        return [first] + [TextView(f"{first.name}+{n}", after=n) for n in range(1, self.options.captions)]

    def requests(self) -> list[FeatureRequest]:
        return [self.image, *self.texts]

    def sample_losses(self, features: Features, batch: Batch) -> Tensor:
        image, texts = self.unit(features)
        found, good = torch.zeros_like(image[:, 0]), (batch.weight > 0).sum()
        for text, weight in zip(texts, self.weights(batch)):
            rows = weight > 0  # a term is the mean over its own rows, what is reported that over the good ones
            found[rows] += self.pair_losses(image[rows], text[rows], batch.uid[rows]) * good / rows.sum()
        return found / len(texts)

    @abstractmethod
    def pair_losses(self, image: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        """(N,) every pair's own part of one term, the mean of which is the term; all pairs of the global batch."""

    def after_step(self, step: int) -> None:
        with torch.no_grad():
            self.logit_scale.clamp_(0, math.log(self.options.max_logit_scale))

    def unit(self, features: Features) -> tuple[Tensor, list[Tensor]]:
        """(image (b, D), each caption's (b, D)), rows of unit length, at least fp32."""
        image, *texts = (F.normalize(at_least_fp32(features[r]), dim=-1) for r in self.requests())
        return image, texts

    def weights(self, batch: Batch) -> list[Tensor]:
        """(b,) what each row counts in each caption's term."""
        return [batch.weight, *(batch.weight * batch.present[text.view] for text in self.texts[1:])]
