"""Towers that keep their weights (LiT, Zhai et al. 2022, §3): what is locked takes no gradient and stands still.

A locked part is in evaluation mode whatever mode the trunk is put into: its BatchNorm keeps its statistics, and
nothing of it is dropped. Features that no trained weight is behind come without a graph, and a step neither sends
gradients into them nor computes them twice (but for the map that regions are cut from).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from pretrain.errors import UserError
from pretrain.models.request import FeatureRequest
from pretrain.models.trunk import Trunk
from pretrain.recipe import LockRecipe

Part = nn.Module | nn.Parameter


def lock(trunk: Trunk, recipe: LockRecipe, requests: Sequence[FeatureRequest]) -> None:
    """Lock what `recipe` names, for a run that asks for `requests`; before the optimizer is built.

    Raises:
        UserError: nothing that is asked for would be trained; blocks that are not there, or of what is not locked.
    """
    _check(trunk, recipe)
    parts: list[Part] = []
    if recipe.image:
        parts += _locked_parts(trunk.image.backbone, recipe.image_unlocked, "image", trunk.image.name)
    if recipe.patches:
        parts.append(trunk.image.backbone.patch_embed)
    if recipe.text and trunk.text is not None:
        parts += _locked_parts(trunk.text, recipe.text_unlocked, "text", "the text tower")
    for part in parts:
        part.requires_grad_(False)
    if trunk.image.projector is not None and recipe.image:
        trunk.image.projector.requires_grad_(not recipe.projection)
    trunk.locked = [part for part in parts if isinstance(part, nn.Module)]
    trunk.train(trunk.training)
    if parts and not any(is_trained(trunk, request) for request in requests):
        raise UserError("model.lock: nothing that the objectives read is trained; leave a tower or a projection open")


def is_trained(trunk: Trunk, request: FeatureRequest) -> bool:
    """Whether a weight that is trained is behind the feature."""
    if request.teacher:
        return False
    if request.tower == "text":
        return trunk.text is None or any(p.requires_grad for p in trunk.text.parameters())
    if request.output == "regions":
        return any(p.requires_grad for p in trunk.image.parameters())
    projection = set() if trunk.image.projector is None else set(trunk.image.projector.parameters())
    backbone = set(trunk.image.backbone.parameters()) - projection
    behind = backbone | projection if request.output == "embedding" and request.from_layer is None else backbone
    return any(p.requires_grad for p in behind)


def locked_input(trunk: Trunk, request: FeatureRequest) -> FeatureRequest | None:
    """The `pooled` feature that a trained projection reads of a locked backbone; None: the feature is none such."""
    if request.tower != "image" or request.output != "embedding" or request.from_layer is not None:
        return None
    pooled = FeatureRequest("image", request.view, "pooled")
    return pooled if is_trained(trunk, request) and not is_trained(trunk, pooled) else None


def _check(trunk: Trunk, recipe: LockRecipe) -> None:
    for name in ("image_unlocked", "projection"):
        if getattr(recipe, name) and not recipe.image:
            raise UserError(f"model.lock.{name} without model.lock.image: set image: true, or leave {name} out")
    if recipe.patches and not hasattr(trunk.image.backbone, "patch_embed"):
        raise UserError(f"model.lock.patches: true, but {trunk.image.name} has no patch embedding; leave it out")
    if recipe.text_unlocked and not recipe.text:
        raise UserError("model.lock.text_unlocked without model.lock.text: set text: true, or leave text_unlocked out")
    if recipe.text and trunk.text is None:
        raise UserError("model.lock.text: true, but the recipe has model.text: null; leave it out")
    if recipe.projection and trunk.image.projector is None:
        raise UserError("model.lock.projection: true, but model.embed_dim: null makes none; leave it out")


def _locked_parts(tower: nn.Module, unlocked: int, side: str, name: str) -> list[Part]:
    """The tower, or all of it before its last `unlocked` blocks: what stands behind them is trained with them."""
    if not unlocked:
        return [tower]
    before, blocks = blocks_of(tower)
    if not blocks:
        raise UserError(f"model.lock.{side}_unlocked: {name} has no blocks or stages to tell apart; leave it out")
    if unlocked > len(blocks):
        raise UserError(f"model.lock.{side}_unlocked {unlocked}: {name} has {len(blocks)} blocks or stages in all")
    return [*tower.parameters(recurse=False), *before, *blocks[:-unlocked]]


def blocks_of(tower: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """(what comes before the blocks, the blocks): timm's towers and our own have their children in running order."""
    before: list[nn.Module] = []
    children = list(tower.named_children())
    for i, (name, child) in enumerate(children):
        if name in ("blocks", "stages", "layers"):
            return before, list(child.children())
        if re.fullmatch(r"layer\d+", name):
            return before, [module for n, module in children[i:] if re.fullmatch(r"layer\d+", n)]
        before.append(child)
    return before, []
