"""The trunk: an image tower and, where the recipe has one, a text tower, run once for all that is asked.

It answers `FeatureRequest`s and knows nothing of objectives: no temperature, no heads, no loss. Views of
one size go through a tower as one batch, so a step costs one pass a tower and size (and batch
normalisation, where a tower has it, sees the views together). Everything goes through `forward`, as
sharding backends demand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

import torch
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.models.image import ImageTower
from pretrain.models.request import FeatureRequest, Input, PooledInput, RegionInput
from pretrain.models.text import TextTower
from pretrain.recipe import ModelRecipe

Tower = Callable[..., dict]


class Trunk(nn.Module):
    """Image and text towers of one shared space."""

    def __init__(self, model: ModelRecipe) -> None:
        super().__init__()
        self.image = ImageTower(model)
        self.embed_dim: int = self.image.embed_dim
        """Width of `embedding`."""
        self.pooled_dim: int = self.image.pooled_dim
        """Width of the image tower's `pooled`."""
        self.text = TextTower(model.text, self.embed_dim, model.activation) if model.text else None
        self.locked: list[nn.Module] = []
        """What stays in evaluation mode in training too; see `pretrain.models.lock`."""

    def train(self, mode: bool = True) -> Trunk:
        super().train(mode)
        for module in self.locked:
            module.eval()
        return self

    def forward(self, inputs: dict[FeatureRequest, Input]) -> dict[FeatureRequest, Tensor]:
        """Each request's feature.

        Images are (b, 3, S, S) uint8, tokens (b, L) int64; `embedding` is (b, embed_dim), not of unit length,
        `pooled` (b, C), tokens of a block (b, L, width). Requests of one view are answered from one pass, regions
        from the map that the pass over their crop leaves, embeddings of pooled features by the projection alone.

        Raises:
            UserError: texts for a trunk without a text tower; what the towers refuse.
        """
        regions = {request: x for request, x in inputs.items() if isinstance(x, RegionInput)}
        views = {request: x for request, x in inputs.items() if isinstance(x, Tensor)}
        views |= {x.map_request: x.images for x in regions.values() if x.cut}
        features: dict[FeatureRequest, Tensor] = {}
        for (tower, _), requests in _by_shape(views):
            features |= _run(self._tower(tower), requests, views)
        for request, x in regions.items():
            features[request] = self.image.embed_regions(x.regions, features[x.map_request] if x.cut else None)
        features |= {r: self.image.project(x.pooled) for r, x in inputs.items() if isinstance(x, PooledInput)}
        return {request: features[request] for request in inputs}

    def _tower(self, name: str) -> Tower:
        if name == "image":
            return self.image
        if self.text is None:
            raise UserError("a text feature was requested, but the recipe has model.text: null")
        return self.text


def build_trunk(model: ModelRecipe, *, seed: int) -> Trunk:
    """A trunk with the weights that `seed` names; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Trunk(model)


def _by_shape(inputs: dict[FeatureRequest, Tensor]) -> Iterable[tuple[tuple, list[FeatureRequest]]]:
    """Requests that one call of a tower can answer: same tower, same size of the sample."""

    def key(request: FeatureRequest) -> tuple:
        return request.tower, tuple(inputs[request].shape[1:])

    return [(k, list(group)) for k, group in groupby(sorted(inputs, key=key), key)]


def _run(
    tower: Tower, requests: list[FeatureRequest], inputs: dict[FeatureRequest, Tensor]
) -> dict[FeatureRequest, Tensor]:
    views = {request.view: inputs[request] for request in requests}  # each once, however much is asked of it
    wanted = {_output(request) for request in requests}
    if len(views) == 1:
        found = tower(inputs[requests[0]], wanted)
        return {request: found[_output(request)] for request in requests}
    found = tower(torch.cat(list(views.values())), wanted)
    rows = [len(x) for x in views.values()]
    # copies, because FSDP2 hooks what a module returns and warns of views
    split = {o: dict(zip(views, (x.clone() for x in found[o].split(rows)))) for o in wanted}
    return {request: split[_output(request)][request.view] for request in requests}


def _output(request: FeatureRequest) -> str | int:
    return request.output if request.from_layer is None else request.from_layer
