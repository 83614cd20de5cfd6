"""Engines that hold the trunk over ranks, behind one interface (`base.Backend`)."""

from __future__ import annotations

from pretrain.backends.base import Backend
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.models.trunk import Trunk
from pretrain.recipe import Recipe, ShardingRecipe

__all__ = ["Backend", "build_backend"]


def build_backend(trunk: Trunk, recipe: Recipe, process: Process, *, teacher: bool = False) -> Backend:
    """The recipe's backend around `trunk`, which it takes over; with `teacher` a momentum copy too.

    Raises:
        UserError: a combination that cannot be right, or DeepSpeed is not installed.
    """
    check_combination(recipe)
    if recipe.backend == "fsdp2":
        from pretrain.backends.fsdp2 import FSDP2

        return FSDP2(trunk, recipe, process, teacher=teacher)
    if recipe.backend.startswith("zero"):
        from pretrain.backends.zero import Zero

        return Zero(trunk, recipe, process, teacher=teacher)
    from pretrain.backends.ddp import DDP

    return DDP(trunk, recipe, process, teacher=teacher)


def check_combination(recipe: Recipe) -> None:
    """UserError, with the reason and what to do, for what a backend cannot do right, or would silently not do."""
    zero = recipe.backend.startswith("zero")
    for key, done in (("within", False), ("offload", zero), ("reshard_after_forward", False)):
        own = getattr(recipe.sharding, key)
        if recipe.backend != "fsdp2" and not done and own != ShardingRecipe.model_fields[key].default:
            raise UserError(
                f"sharding.{key}: {own} means nothing to backend {recipe.backend}; leave it out, or take backend=fsdp2"
            )
    if zero and recipe.optimizer.name in ("lars", "muon"):
        raise UserError(
            f"optimizer {recipe.optimizer.name} looks at whole tensors, and under backend {recipe.backend} an "
            "optimizer sees flat pieces of them: it would silently be another optimizer. Use backend=fsdp2 or ddp, or "
            "optimizer.name=adamw"
        )
    if recipe.backend == "fsdp2" and recipe.optimizer.name == "lars" and recipe.sharding.offload:
        raise UserError(
            "optimizer lars sums norms over the ranks, where weights in host memory cannot go. Use "
            "sharding.offload=false, or optimizer.name=sgd"
        )
