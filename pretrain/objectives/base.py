"""The two-stage contract: an objective asks for features, then scores them. It never sees a model.

The engine computes the union of all objectives' requests once, hands every objective the features as leaves, lets
the loss fill their gradients, and sends these back through the towers, in one pass or in micro-batches whose
features were cached (GradCache). So accumulation, shared trunks and sharding have one code path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pretrain.distributed.groups import Group
from pretrain.models.request import FeatureRequest
from pretrain.views.spec import ImageView, TextView

if TYPE_CHECKING:
    from pretrain.reader import Batch

Features = dict[FeatureRequest, Tensor]


@dataclass
class Loss:
    """What an objective returns for one global batch."""

    value: Tensor
    """Scalar: the global mean on every rank; its gradient is W x the local share."""
    signals: dict[str, Tensor | float] = field(default_factory=dict)
    """Named figures for the log, the same on every rank."""


def at_least_fp32(x: Tensor) -> Tensor:
    """`x`, or its fp32 copy when it is of lower precision; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


class ObjectiveOptions(BaseModel):
    """What every objective takes from the recipe; a subclass adds its own fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    weight: float = Field(default=1.0, gt=0)
    """Factor of this objective in the joint loss."""


class Objective(nn.Module, ABC):
    """Base of all objectives. Parameters are fp32, replicated, of at least one dimension, reduced by the engine."""

    Options: type[ObjectiveOptions] = ObjectiveOptions

    def __init__(self, options: ObjectiveOptions) -> None:
        super().__init__()
        self.options = options

    def image_views(self, size: int) -> list[ImageView]:
        """Crops this objective wants of every image; `size` is the trunk's, pixels."""
        return []

    def text_views(self) -> list[TextView]:
        """Texts this objective wants of every sample."""
        return []

    @abstractmethod
    def requests(self) -> list[FeatureRequest]:
        """Features of these views that `loss` will be given."""

    @abstractmethod
    def loss(self, features: Features, batch: Batch, group: Group) -> Loss:
        """The loss of this rank's rows of the global batch; collectives run on all ranks, always."""

    @abstractmethod
    def sample_losses(self, features: Features, batch: Batch) -> Tensor:
        """(b,) each sample's own loss, for `replay`; `features` and `batch` are the whole global batch."""

    def before_step(self, step: int) -> None:
        """Called before the features of a step are computed."""

    def after_step(self, step: int) -> None:
        """Called after the optimizer's step (clamp a temperature, renormalise prototypes)."""
