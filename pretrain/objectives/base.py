"""The two-stage contract: an objective asks for features, then scores them. It never sees a model.

The engine computes the union of all objectives' requests once, hands every objective the features as leaves, lets
the loss fill their gradients, and sends these back through the towers, in one pass or in micro-batches whose
features were cached (GradCache). So accumulation, shared trunks and sharding have one code path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from pretrain.distributed.groups import Group
from pretrain.models.request import FeatureRequest
from pretrain.recipe import RegionRecipe
from pretrain.views.spec import ImageView, RegionView, TextView

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


@dataclass(frozen=True)
class RunFacts:
    """What an objective may know of its run before the first step: enough to size heads, queues and schedules."""

    pooled_dim: int
    """Width of the image tower's `pooled` features."""
    global_batch: int
    total_steps: int
    samples: int
    """Samples an epoch."""
    seed: int
    rank: int = 0
    world: int = 1
    regions: RegionRecipe | None = None
    """What the image tower can read of regions; None: nothing."""


class Closed(BaseModel):
    """Options that refuse what they do not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Ramp(Closed):
    """A figure that goes in a straight line from `start` to `end`, and stays there."""

    start: float = Field(ge=0)
    end: float = Field(ge=0)
    from_step: int = Field(default=0, ge=0)
    to_step: int = Field(ge=1)

    def at(self, step: int) -> float:
        """The figure at 0-based `step`."""
        share = (step - self.from_step) / max(1, self.to_step - self.from_step)
        return self.start + (self.end - self.start) * min(max(share, 0.0), 1.0)


class ObjectiveOptions(Closed):
    """What every objective takes from the recipe; a subclass adds its own fields."""

    weight: float | Ramp = 1.0
    """Factor of this objective in the joint loss, or `{start, end, from_step, to_step}`."""

    @field_validator("weight")
    @classmethod
    def _above_zero(cls, weight: float | Ramp) -> float | Ramp:
        if isinstance(weight, float) and not weight > 0:
            raise ValueError("must be above 0: leave the objective out instead")
        return weight

    def weight_at(self, step: int) -> float:
        """The factor at 0-based `step`."""
        return self.weight.at(step) if isinstance(self.weight, Ramp) else self.weight


class Objective(nn.Module, ABC):
    """Base of all objectives. Parameters are fp32, replicated, of at least one dimension, reduced by the engine.

    Buffers are replicated too and must come out equal on all ranks; state that is spread over ranks is a `Sharded`
    module (`pieces/sharded.py`). All of it is in the checkpoint.
    """

    Options: type[ObjectiveOptions] = ObjectiveOptions

    def __init__(self, options: ObjectiveOptions, facts: RunFacts) -> None:
        super().__init__()
        self.options = options
        self.facts = facts

    def image_views(self, size: int) -> list[ImageView]:
        """Crops this objective wants of every image; `size` is the trunk's, pixels."""
        return []

    def text_views(self) -> list[TextView]:
        """Texts this objective wants of every sample."""
        return []

    def region_views(self) -> list[RegionView]:
        """Regions this objective wants of every image."""
        return []

    @abstractmethod
    def requests(self) -> list[FeatureRequest]:
        """Features of these views that `loss` will be given."""

    @abstractmethod
    def loss(self, features: Features, batch: Batch, group: Group) -> Loss:
        """The loss of this rank's rows of the global batch; collectives run on all ranks, always.

        Called exactly once a step: what the objective remembers (a queue, a centre) is brought forward here.
        """

    @abstractmethod
    def sample_losses(self, features: Features, batch: Batch) -> Tensor:
        """(b,) each sample's own loss, for `replay`; `features` and `batch` are the whole global batch.

        It remembers nothing: the objective is afterwards as it was.
        """

    def teacher_momentum(self, step: int) -> float | None:
        """How much of the trunk's momentum teacher stays at the end of 0-based `step`; None: it asks for none."""
        return None

    def before_step(self, step: int) -> None:
        """Called before the features of a step are computed."""

    def after_step(self, step: int) -> None:
        """Called after the optimizer's step (clamp a temperature, bring a head's teacher forward)."""

    def warnings(self, figures: Mapping[str, float], step: int) -> list[str]:
        """Known failures that a logged step's `loss` and signals show, each with what to do about it."""
        return []
