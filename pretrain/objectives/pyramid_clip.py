"""PyramidCLIP: an image and its texts contrasted at three levels, within a level and across (Gao et al. 2022).

The whole image, a part of it and its objects' regions on one side; a summary, the caption and the objects' names on
the other. One image tower, one text tower, one temperature. Samples need not have all of it: a row without a summary,
without objects or without regions is left out of the terms that read them, and `python -m pretrain enrich` makes what
is missing. As everywhere, the loss is that of the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from pretrain.distributed.collectives import all_reduce_sum
from pretrain.distributed.groups import Group
from pretrain.errors import UserError
from pretrain.models.request import FeatureRequest
from pretrain.objectives.base import Features, Loss, Objective, ObjectiveOptions, RunFacts
from pretrain.objectives.functional.pyramid import pyramid_losses, pyramid_sample_losses
from pretrain.objectives.functional.reduction import at_least_fp32
from pretrain.views.spec import ImageView, RegionView, TextView

if TYPE_CHECKING:
    from pretrain.reader import Batch


class PyramidClipOptions(ObjectiveOptions):
    """PyramidCLIP's settings; the defaults are the paper's."""

    scale_global: tuple[float, float] = (0.9, 1.0)
    """Area of the crop that shows the whole image, as a share of it."""
    scale_local: tuple[float, float] = (0.5, 1.0)
    """Area of the crop that shows a part."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a horizontal flip of either crop."""
    softening: float = Field(default=0.2, ge=0, lt=1)
    """Share of a target that is spread over the other candidates."""
    weights: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    """Of the terms within a level, of those across with the whole image, of those across with its parts."""
    tags: bool = True
    """Contrast with the objects' names and attributes (`json`, "objects")."""
    regions: bool = True
    """Contrast with the objects' regions, which a tower with `model.regions` reads."""
    temperature: float = Field(default=0.07, gt=0)
    """Temperature at the start; learned from there."""
    max_logit_scale: float = Field(default=100.0, gt=1)
    """Upper bound of the learned scale (1 / temperature)."""

    @field_validator("weights")
    @classmethod
    def _some_weight(cls, weights: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(weights) < 0 or not any(weights):
            raise ValueError("must be three numbers ≥ 0, one at least above 0")
        return weights

    @model_validator(mode="after")
    def _some_contrast(self) -> PyramidClipOptions:
        if not (self.weights[0] or self.tags or self.regions):
            raise ValueError(
                "without tags and regions the first of weights must be above 0: nothing else is contrasted"
            )
        return self


class PyramidClip(Objective):
    """Six softened contrasts over the global batch, with one learned temperature."""

    Options = PyramidClipOptions
    options: PyramidClipOptions

    def __init__(self, options: PyramidClipOptions, facts: RunFacts) -> None:
        super().__init__(options, facts)
        if options.regions and facts.regions is None:
            raise UserError(
                "objectives.pyramid_clip reads regions, but the recipe has model.regions: null; give it "
                "model.regions: {} (or objectives.pyramid_clip.regions: false)"
            )
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(options.temperature)]))
        self.asked = {
            "global": FeatureRequest("image", "pyramid.global"),
            "local": FeatureRequest("image", "pyramid.local"),
            "summary": FeatureRequest("text", "summary"),
            "text": FeatureRequest("text", "caption"),
        }
        if options.regions:
            self.asked["regions"] = FeatureRequest("image", "regions", output="regions")
        if options.tags:
            self.asked["tags"] = FeatureRequest("text", "tags")

    def image_views(self, size: int) -> list[ImageView]:
        return [
            ImageView("pyramid.global", size, scale=self.options.scale_global, flip=self.options.flip),
            ImageView("pyramid.local", size, scale=self.options.scale_local, flip=self.options.flip),
        ]

    def text_views(self) -> list[TextView]:
        views = [TextView("caption"), TextView("summary", "summary.txt", required=False)]
        return views + ([TextView("tags", "json", form="tags", required=False)] if self.options.tags else [])

    def region_views(self) -> list[RegionView]:
        regions = self.facts.regions
        if not self.options.regions or regions is None:
            return []
        return [RegionView("regions", "pyramid.global", regions.most, regions.stored_dim)]

    def requests(self) -> list[FeatureRequest]:
        return list(self.asked.values())

    def loss(self, features: Features, batch: Batch, group: Group) -> Loss:
        present = self._present(batch)
        value, terms = pyramid_losses(
            self._unit(features),
            self.logit_scale,
            softening=self.options.softening,
            weights=self.options.weights,
            present=present,
            ids=batch.uid,
            weight=batch.weight,
            group=group,
        )
        shares = _shares(present, batch.weight, group)
        return Loss(value, {"logit_scale": self.logit_scale.detach().exp(), **terms, **shares})

    def sample_losses(self, features: Features, batch: Batch) -> Tensor:
        return pyramid_sample_losses(
            self._unit(features),
            self.logit_scale,
            softening=self.options.softening,
            weights=self.options.weights,
            present=self._present(batch),
            ids=batch.uid,
            weight=batch.weight,
        )

    def after_step(self, step: int) -> None:
        with torch.no_grad():
            self.logit_scale.clamp_(0, math.log(self.options.max_logit_scale))

    def warnings(self, figures: Mapping[str, float], step: int) -> list[str]:
        fields = [name for name in ("summary", "tags", "regions") if figures.get(f"present/{name}") == 0]
        return [
            f"no sample of a logged batch has {name}, so its terms are 0; `python -m pretrain enrich` adds it"
            for name in fields
        ]

    def _unit(self, features: Features) -> dict[str, Tensor]:
        return {name: F.normalize(at_least_fp32(features[request]), dim=-1) for name, request in self.asked.items()}

    def _present(self, batch: Batch) -> dict[str, Tensor]:
        """Which rows have the features that a sample may lack."""
        return {name: batch.present[name] for name in ("summary", "tags", "regions") if name in self.asked}


def _shares(present: Mapping[str, Tensor], weight: Tensor, group: Group) -> dict[str, Tensor]:
    """Share of the global batch's good rows that have each feature."""
    counts = [weight.sum(), *((weight * rows).sum() for rows in present.values())]
    total, *found = all_reduce_sum(torch.stack(counts), group).unbind()
    return {f"present/{name}": count / total.clamp(min=1.0) for name, count in zip(present, found)}


OBJECTIVE = PyramidClip
