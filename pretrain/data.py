"""A recipe's sources and their order: what can be known of the data before any model exists. torch is not imported."""

from __future__ import annotations

from pretrain.errors import UserError
from pretrain.order import BalancedOrder, Order, SampleOrder, SkippingOrder
from pretrain.recipe import Recipe
from pretrain.shards.labels import source_labels
from pretrain.shards.source import Source, open_source

INDEXED_SAMPLES = 4_000_000  # whose indexes a rank keeps (about 80 bytes each) when any may be asked for next


def open_data(recipe: Recipe, sources: list[Source] | None = None) -> tuple[list[Source], Order]:
    """The sources of a recipe, which may be open already, and the order their samples are seen in.

    Raises:
        UserError: a shard is missing, a source is empty, the batch is larger than the data, weights or classes
            do not fit.
    """
    if sources is None:
        sources = [open_source(s.shards) for s in recipe.data.sources]
    if recipe.data.classes_per_batch is not None:
        order: Order = _balanced(recipe, sources, recipe.data.classes_per_batch)
    else:
        order = _plain(recipe, sources)
    skips = [(s.from_step, s.skip) for s in recipe.data.segments if s.skip]
    return sources, SkippingOrder(order, skips) if skips else order


def _plain(recipe: Recipe, sources: list[Source]) -> SampleOrder:
    weights = [s.weight for s in recipe.data.sources if s.weight is not None]
    if weights and len(weights) < len(sources):
        raise UserError("data.sources: give every source a weight, or none")
    return SampleOrder(
        [s.lengths for s in sources],
        seed=recipe.seed,
        global_batch=recipe.global_batch,
        weights=weights or None,
        segments=[(s.from_step, s.weights) for s in recipe.data.segments if s.weights is not None],
        block=recipe.data.block,
        window=recipe.data.window,
    )


def _balanced(recipe: Recipe, sources: list[Source], classes_per_batch: int) -> BalancedOrder:
    """Every class alike, so nothing else may say what share a sample has of a batch."""
    weighted = any(s.weight is not None for s in recipe.data.sources)
    changed = [s for s in recipe.data.segments if s.weights is not None]
    keys = {"data.sources weight": weighted, "data.segments": changed, "data.block": recipe.data.block}
    if given := [name for name, value in keys.items() if value]:
        raise UserError(
            f"data.classes_per_batch gives every class the same share of a batch, whatever source and place its "
            f"samples are of: take {' and '.join(given)} out of the recipe, or data.classes_per_batch"
        )
    for source in sources:
        source.keep_indexes(INDEXED_SAMPLES // len(sources))
    labels = [source_labels(source) for source in sources]
    return BalancedOrder(
        labels, seed=recipe.seed, global_batch=recipe.global_batch, classes_per_batch=classes_per_batch
    )
