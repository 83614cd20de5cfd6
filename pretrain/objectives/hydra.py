"""Hydra: images of any two classes attract, in the dimensions that the pair of classes opens (arXiv 2410.18200).

Every image is told a partner class, and the gate of (own class, partner) chooses the dimensions in which it is
compared with images of the partner class, against those of all others. One view asks, the other answers; one
direction, as the authors' code. Classes are labels of the data, or clusters found on the way (`pseudo_labels`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.distributed.collectives import all_gather_rows, all_reduce_max, all_reduce_sum
from pretrain.distributed.groups import LOCAL, Group
from pretrain.errors import UserError
from pretrain.models.request import FeatureRequest
from pretrain.objectives.base import Features, Loss, Objective, RunFacts
from pretrain.objectives.functional.hydra import Form, HydraRows, Partners, hydra_partners, hydra_rows
from pretrain.objectives.functional.reduction import at_least_fp32, global_mean
from pretrain.objectives.pieces.clusters import OnlineClusters
from pretrain.objectives.pieces.crops import ViewOptions
from pretrain.objectives.pieces.gates import Gates
from pretrain.views.spec import ImageView

if TYPE_CHECKING:
    from pretrain.reader import Batch

log = logging.getLogger(__name__)

MAX_LOGIT_SCALE = 100.0
SETTLED = 1000  # steps before the loss and the gates are judged


class HydraOptions(ViewOptions):
    """Hydra's own settings; the defaults are the authors' code's for ImageNet."""

    classes: int | None = Field(default=None, ge=2)
    """How many classes the labels have: they run from 0 to classes - 1."""
    pseudo_labels: int | None = Field(default=None, ge=2)
    """Number of clusters whose numbers stand in for labels; the data's own labels are then not read."""
    size: int | None = Field(default=None, ge=1)
    """Side of both views, pixels; null: the trunk's."""
    scale: tuple[float, float] = (0.4, 1.0)
    """Area of the random crops, as a share of the image."""
    jitter: tuple[float, float, float, float] | None = (0.4, 0.4, 0.2, 0.1)
    grey: float = Field(default=0.1, ge=0, le=1)
    blur: float = Field(default=1.0, ge=0, le=1)
    solarize: float = Field(default=0.2, ge=0, le=1)
    """Chance of a solarised second view."""
    hidden: int = Field(default=2048, ge=1)
    dim: int = Field(default=256, ge=1)
    gate: Literal["learned", "open"] = "learned"
    """`open`: every dimension of every pair, the control without gates."""
    gate_width: int = Field(default=512, ge=1)
    """Of the classes' embeddings."""
    gate_hidden: int = Field(default=1024, ge=1)
    fuse: bool = True
    """One gate of the two classes' mean embedding; false: the product of both classes' gates."""
    gate_penalty: float = Field(default=0.0, ge=0)
    """Weight of mean 4 g (1 - g): pulls gates to 0 or 1."""
    partners: Partners = "arbitrary"
    """`arbitrary`: any class of the batch; `identical`: the own class; `distinct`: any class but the own."""
    form: Form = "gated_cosine"
    """`gated_cosine`: cosine of the gated vectors, as the paper has it; `gated_dot`: the code's later form."""
    temperature: float = Field(default=0.1, gt=0)
    learn_temperature: bool = False

    @model_validator(mode="after")
    def _one_kind_of_class(self) -> HydraOptions:
        if (self.classes is None) == (self.pseudo_labels is None):
            raise ValueError("needs classes: N for labelled data, or pseudo_labels: N for data without, one of the two")
        return self


class Hydra(Objective):
    """Gated contrast between classes, over the global batch."""

    Options = HydraOptions
    options: HydraOptions
    views = (FeatureRequest("image", "hydra/0", "pooled"), FeatureRequest("image", "hydra/1", "pooled"))

    def __init__(self, options: HydraOptions, facts: RunFacts) -> None:
        super().__init__(options, facts)
        self.classes = options.classes or options.pseudo_labels or 0
        self.projector = nn.Sequential(
            nn.Linear(facts.pooled_dim, options.hidden),
            nn.BatchNorm1d(options.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(options.hidden, options.dim, bias=False),
            nn.LayerNorm(options.dim),
        )
        self.gates: Gates | None = None
        if options.gate == "learned":
            sizes = options.gate_width, options.gate_hidden, options.dim
            self.gates = Gates(self.classes, *sizes, fuse=options.fuse)
        self.logit_scale: nn.Parameter | None = None
        if options.learn_temperature:
            self.logit_scale = nn.Parameter(torch.tensor([-math.log(options.temperature)]))
        self.clusters: OnlineClusters | None = None
        if options.pseudo_labels:
            self.clusters = OnlineClusters(options.pseudo_labels, facts.pooled_dim, seed=facts.seed)
        self._said_pseudo = False

    def image_views(self, size: int) -> list[ImageView]:
        options, side = self.options, self.options.size or size
        first = options.view("hydra/0", side, options.scale)
        return [first, options.view("hydra/1", side, options.scale, solarize=options.solarize)]

    def requests(self) -> list[FeatureRequest]:
        return list(self.views)

    def loss(self, features: Features, batch: Batch, group: Group) -> Loss:
        if self.clusters is None:
            labels = self._data_labels(batch)
            self._check(labels, batch, group)
        else:
            labels = self.clusters(features[self.views[0]], batch.weight, group)
            self._say_pseudo(batch.step)
        rows, gates, present = self._rows(features, labels, batch.step, group)
        value = global_mean(rows.losses.sum(), rows.positives.sum(), group)
        if self.options.gate_penalty:
            binary = (4 * gates * (1 - gates)).mean(1)[present]
            value = value + self.options.gate_penalty * global_mean(binary.sum(), len(binary), group)
        return Loss(value, self._signals(rows, gates.detach(), present, group))

    @torch.no_grad()
    def sample_losses(self, features: Features, batch: Batch) -> Tensor:
        if self.clusters is None:
            labels = self._data_labels(batch)
        else:
            labels = self.clusters.assign(features[self.views[0]], batch.weight, LOCAL)
        rows, _, _ = self._rows(features, labels, batch.step, LOCAL)
        # scaled so that the mean over sound samples is the loss, a mean over positive pairs
        return rows.losses * (batch.weight.sum() / rows.positives.sum().clamp(min=1))

    def after_step(self, step: int) -> None:
        if self.logit_scale is not None:
            with torch.no_grad():
                self.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))

    def warnings(self, figures: Mapping[str, float], step: int) -> list[str]:
        lines = []
        if figures["no_positive"] > 0.5:
            lines.append(
                f"{figures['no_positive']:.0%} of the images have no other-view image of their partner class in the "
                "batch and learn nothing: set data.classes_per_batch, a larger global_batch, or partners: arbitrary"
            )
        opened = figures["activation"] / self.options.dim
        if self.gates is not None and step >= SETTLED and not 0.02 < opened < 0.98:
            what = "open: there is no filter any more" if opened > 0.5 else "closed: there is nothing left to compare"
            lines.append(f"all gates are {what}. Try a lower optimizer.lr, another form, or gate_penalty: 0")
        if step >= SETTLED and figures["loss"] > 0.995 * figures["chance"] > 0:
            lines.append(
                "the loss is no better than if images of all classes were equally alike: try a lower temperature, a "
                "lower optimizer.lr, weaker jitter; and look at RankMe for collapse"
            )
        return lines

    def _rows(self, features: Features, labels: Tensor, step: int, group: Group) -> tuple[HydraRows, Tensor, Tensor]:
        """(each anchor's part of the loss, gates (b, dim), which rows take part (b,))."""
        options = self.options
        partners = hydra_partners(
            labels, seed=self.facts.seed, step=step, mode=options.partners, num_classes=self.classes, group=group
        )
        z, k = self.projector(torch.cat([at_least_fp32(features[r]) for r in self.views])).chunk(2)
        present = labels >= 0
        gates = torch.ones_like(z)
        if self.gates is not None:
            own = self.gates(labels[present], partners[present])
            gates = torch.zeros_like(z).index_put((present,), own)
        temperature = options.temperature if self.logit_scale is None else (-self.logit_scale).exp()
        rows = hydra_rows(z, k, gates, labels, partners, temperature=temperature, form=options.form, group=group)
        return rows, gates, present

    def _data_labels(self, batch: Batch) -> Tensor:
        """(b,) the samples' own, -1 where a row has none or is damaged."""
        return torch.where(batch.weight > 0, batch.labels, -1).clamp(min=-1)

    @torch.no_grad()
    def _check(self, labels: Tensor, batch: Batch, group: Group) -> None:
        """UserError, on all ranks alike, for a label beyond the classes, or none in a run's first batch."""
        own = (
            torch.stack([labels.max(), (batch.weight > 0).max().long()]) if len(labels) else labels.new_tensor([-1, 0])
        )
        highest, sound = all_reduce_max(own, group).tolist()
        if highest >= self.classes:
            raise UserError(
                f"objectives.hydra.classes is {self.classes}, so labels run from 0 to {self.classes - 1}, but sample "
                f"{_key_of(highest, labels, batch, group)} has label {highest}: set classes to {highest + 1} or more"
            )
        if sound and highest < 0 and batch.step == 0:  # later batches may lack labels, after a resume too
            raise UserError(
                "objectives.hydra.classes asks for labelled data, but no sample of the first batch has a label: give "
                "each image a `.cls` (a whole number) in its shard, or set objectives.hydra.pseudo_labels: N instead "
                "of classes, to cluster images into N groups while training"
            )

    def _say_pseudo(self, step: int) -> None:
        if not self._said_pseudo and self.facts.rank == 0:
            log.info(
                "hydra: from step %d on classes are pseudo-labels: %d clusters of the trunk's own features, not the "
                "data's labels", step, self.classes,
            )  # fmt: skip
        self._said_pseudo = True

    @torch.no_grad()
    def _signals(self, rows: HydraRows, gates: Tensor, present: Tensor, group: Group) -> dict[str, Tensor | float]:
        """Figures over the global batch, by one reduction of six numbers."""
        entropy = (torch.special.entr(gates) + torch.special.entr(1 - gates)).mean(1)
        each = torch.stack([
            present.to(gates.dtype),
            gates.sum(1) * present,
            entropy * present,
            rows.positives.to(gates.dtype),
            ((rows.positives == 0) & present).to(gates.dtype),
            rows.positives * rows.negatives.to(gates.dtype).log1p(),
        ])  # fmt: skip
        anchors, opened, entropies, positives, without, chance = all_reduce_sum(each.sum(1), group).unbind()
        anchors = anchors.clamp(min=1)
        signals: dict[str, Tensor | float] = {
            "activation": opened / anchors,
            "gate_entropy": entropies / anchors,
            "positives": positives / anchors,
            "no_positive": without / anchors,
            "chance": chance / positives.clamp(min=1),
        }
        if self.logit_scale is not None:
            signals["logit_scale"] = self.logit_scale.detach().exp()
        if self.clusters is not None:
            signals["pseudo_labels_used"] = self.clusters.used
        return signals


def _key_of(label: int, labels: Tensor, batch: Batch, group: Group) -> str:
    """The key of the first sample with this label on the lowest rank that has one; told to all ranks."""
    rows = (labels == label).nonzero()[:1, 0].tolist()
    told = "\n".join(batch.keys[i] for i in rows) + "\n" * len(rows)
    everyone = all_gather_rows(torch.tensor(list(told.encode()), dtype=torch.uint8, device=labels.device), group)
    return bytes(everyone.tolist()).decode().split("\n")[0]


OBJECTIVE = Hydra
