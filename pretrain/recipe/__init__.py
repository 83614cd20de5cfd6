"""A run as one typed, documented value: YAML file + ``key=value`` overrides, checked as a whole before anything starts.

Unknown keys are refused with the nearest right name. What an objective understands is declared in its own module
(`Options`) and checked by `pretrain.objectives.build`; everything else is here. torch is not imported.
"""

from pretrain.recipe.data import DataRecipe, SegmentRecipe, SourceRecipe
from pretrain.recipe.model import OPENAI_MEAN, OPENAI_STD, LockRecipe, ModelRecipe, RegionRecipe, TextRecipe
from pretrain.recipe.reading import dump_recipe, load_recipe, parse_recipe, shipped_recipes
from pretrain.recipe.run import (
    CheckpointRecipe,
    ComputeRecipe,
    EmaRecipe,
    EvaluateRecipe,
    FaultsRecipe,
    InitRecipe,
    LogRecipe,
    OptimizerRecipe,
    ScheduleRecipe,
    ShardingRecipe,
    WandbRecipe,
)
from pretrain.recipe.whole import Recipe, check_split

__all__ = [
    "OPENAI_MEAN", "OPENAI_STD", "CheckpointRecipe", "ComputeRecipe", "DataRecipe", "EmaRecipe", "EvaluateRecipe",
    "FaultsRecipe", "InitRecipe", "LockRecipe", "LogRecipe", "ModelRecipe", "OptimizerRecipe", "Recipe", "RegionRecipe",
    "ScheduleRecipe", "SegmentRecipe", "ShardingRecipe", "SourceRecipe", "TextRecipe", "WandbRecipe", "check_split",
    "dump_recipe", "load_recipe", "parse_recipe", "shipped_recipes",
]  # fmt: skip
