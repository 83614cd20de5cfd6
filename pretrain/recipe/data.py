"""The recipe's `data`: where samples come from and how they are read."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pretrain.recipe.base import Part


class SourceRecipe(Part):
    """One set of shards."""

    shards: str | list[str]
    """A folder of tars, a glob, a brace expansion (`a-{000..009}.tar`), or a list of these."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the batch, relative to the other sources; null for all: in proportion to their samples."""


def _bare_path(value: Any) -> Any:
    return {"shards": value} if isinstance(value, str) else value


class SegmentRecipe(Part):
    """A change of the data during a run: other weights of the sources, or batches that are left out."""

    from_step: int = Field(ge=0)
    """Of weights: counted in batches of the order, those left out too."""
    weights: list[float] | None = None
    """A share for every source, from here on."""
    skip: int = Field(default=0, ge=0)
    """So many batches, from here on, are never seen."""

    @model_validator(mode="after")
    def _changes_something(self) -> SegmentRecipe:
        if (self.weights is None) == (not self.skip):
            raise ValueError("give a segment either weights or skip")
        return self


class DataRecipe(Part):
    """Where samples come from and how they are read."""

    sources: list[Annotated[SourceRecipe, BeforeValidator(_bare_path)]] = Field(min_length=1)
    segments: list[SegmentRecipe] = []
    """Changes that are appended while the run goes on; what was seen stays as it was."""
    block: int | None = Field(default=None, ge=1)
    """Samples that lie together in a shard and are read at once; null: clamp(N / (16·lanes), 1, 256)."""
    window: int = Field(default=4096, ge=1)
    """Samples a lane shuffles among."""
    classes_per_batch: int | None = Field(default=None, ge=1)
    """P: every global batch holds P classes with global_batch / P samples each; null: the plain order."""
    threads: int = Field(default=2, ge=1)
    """Decoding threads a rank."""
    prefetch: int = Field(default=2, ge=1)
    """Batches prepared ahead a rank."""
    max_damaged: float = Field(default=0.01, ge=0, le=1)
    """Stop when more than this share of the samples is unreadable."""
