"""A recipe's sources and their order: what can be known of the data before any model exists. torch is not imported."""

from __future__ import annotations

from pretrain.errors import UserError
from pretrain.order import SampleOrder
from pretrain.recipe import Recipe
from pretrain.shards.source import Source, open_source


def open_data(recipe: Recipe) -> tuple[list[Source], SampleOrder]:
    """The sources of a recipe and the order their samples are seen in.

    Raises:
        UserError: a shard is missing, a source is empty, the batch is larger than the data, weights do not fit.
    """
    sources = [open_source(s.shards) for s in recipe.data.sources]
    weights = [s.weight for s in recipe.data.sources if s.weight is not None]
    if weights and len(weights) < len(sources):
        raise UserError("data.sources: give every source a weight, or none")
    order = SampleOrder(
        [s.lengths for s in sources],
        seed=recipe.seed,
        global_batch=recipe.global_batch,
        weights=weights or None,
        segments=[(s.from_step, s.weights) for s in recipe.data.segments],
        block=recipe.data.block,
        window=recipe.data.window,
    )
    return sources, order
