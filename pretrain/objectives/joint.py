"""All objectives of a run as one: the union of what they ask, the weighted sum of what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pretrain.distributed.groups import Group
from pretrain.errors import UserError
from pretrain.models.request import FeatureRequest
from pretrain.objectives.base import Features, Objective
from pretrain.views.spec import ImageView, RegionView, TextView

if TYPE_CHECKING:
    from pretrain.reader import Batch


class Joint(nn.Module):
    """Objectives by name, in the recipe's order."""

    def __init__(self, objectives: dict[str, Objective]) -> None:
        super().__init__()
        # a plug-in's dotted path is no module name in torch
        self.by_name = objectives
        self.members = nn.ModuleDict({name.replace(".", "_"): o for name, o in objectives.items()})

    def image_views(self, size: int) -> list[ImageView]:
        """Union of the crops asked for.

        Raises:
            UserError: two objectives give one name to different crops, or a crop cannot be cut.
        """
        asked = []
        for name, objective in self.by_name.items():
            try:
                asked += [(name, view) for view in objective.image_views(size)]
            except ValueError as error:
                raise UserError(f"objectives.{name}: {error}") from None
        return _union(asked)

    def text_views(self) -> list[TextView]:
        """Union of the texts asked for; UserError as for `image_views`."""
        return _union([(n, v) for n, o in self.by_name.items() for v in o.text_views()])

    def region_views(self) -> list[RegionView]:
        """Union of the regions asked for; UserError as for `image_views`."""
        return _union([(n, v) for n, o in self.by_name.items() for v in o.region_views()])

    def requests(self) -> list[FeatureRequest]:
        """Union of the features asked for, in a stable order."""
        return list(dict.fromkeys(r for o in self.by_name.values() for r in o.requests()))

    def loss(self, features: Features, batch: Batch, group: Group) -> tuple[Tensor, dict[str, Tensor | float]]:
        """(weighted sum of the losses, every objective's own loss and signals by name)."""
        total: Tensor | None = None
        figures: dict[str, Tensor | float] = {}
        for name, objective in self.by_name.items():
            own = objective.loss(features, batch, group)
            part = objective.options.weight_at(batch.step) * own.value
            total = part if total is None else total + part
            figures[f"loss/{name}"] = own.value.detach()
            for signal, figure in own.signals.items():
                figures[f"{name}/{signal}"] = figure
        assert total is not None
        return total, figures

    def sample_losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        """(b,) each sample's share of the joint loss, by objective; see `Objective.sample_losses`."""
        step = batch.step
        return {n: o.options.weight_at(step) * o.sample_losses(features, batch) for n, o in self.by_name.items()}

    def teacher_momentum(self, step: int) -> float | None:
        """The momentum that all objectives with a teacher agree on; None where no one has one.

        Raises:
            UserError: they do not agree: a run has one teacher.
        """
        asked = {name: m for name, o in self.by_name.items() if (m := o.teacher_momentum(step)) is not None}
        if len(set(asked.values())) > 1:
            told = ", ".join(f"{name} {momentum:g}" for name, momentum in asked.items())
            raise UserError(
                f"objectives: a run has one momentum teacher, but at step {step} they ask for {told}; "
                "set their momentum (and momentum_final) alike, or train them in two runs"
            )
        return next(iter(asked.values()), None)

    def before_step(self, step: int) -> None:
        for objective in self.by_name.values():
            objective.before_step(step)

    def after_step(self, step: int) -> None:
        for objective in self.by_name.values():
            objective.after_step(step)

    def warnings(self, figures: Mapping[str, float], step: int) -> list[str]:
        """What the figures of `loss`, as plain numbers, warn of; each line names its objective."""
        lines = []
        for name, objective in self.by_name.items():
            own = {k.removeprefix(f"{name}/"): v for k, v in figures.items() if k.startswith(f"{name}/")}
            own["loss"] = figures[f"loss/{name}"]
            lines += [f"{name}: {line}" for line in objective.warnings(own, step)]
        return lines


def _union(asked: Sequence[tuple[str, ImageView | TextView | RegionView]]) -> list:
    views: dict = {}
    for objective, view in asked:
        if views.setdefault(view.name, view) != view:
            raise UserError(
                f"objectives.{objective}: its view {view.name!r} differs from another objective's view of that name"
            )
    return list(views.values())
