"""What of a run's state lies on one rank from step to step, backend by backend.

Where weights are spread, blocks are made whole while they run: counted are what is in no block, the largest block
twice (the next one is fetched meanwhile), and its gradient once. With `reshard_after_forward: false` all blocks are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from pretrain.backends.zero import BUCKET
from pretrain.models.compute import all_units
from pretrain.models.trunk import Trunk
from pretrain.objectives.joint import Joint
from pretrain.optim.build import muon_pieces
from pretrain.recipe import OptimizerRecipe, Recipe

SPREAD = {
    "weights": ("zero3", "fsdp2"),
    "gradients": ("zero2", "zero3", "fsdp2"),
    "optimizer": ("zero1", "zero2", "zero3", "fsdp2"),
}
"""Which backends spread what over the ranks."""


def state(
    recipe: Recipe, trunk: Trunk, joint: Joint, teacher: bool, *, world: int, host: bool = False
) -> dict[str, int]:
    """Bytes by kind on a rank of `world`; objectives' own state is whole on every rank.

    host: the towers run in host memory, so nothing can be offloaded to it.
    """
    backend = "ddp" if recipe.backend == "auto" else recipe.backend
    ranks = (recipe.sharding.within or world) if backend == "fsdp2" else world
    parameters = dict(trunk.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    own = {name: p for name, p in joint.named_parameters() if p.requires_grad}
    buffers = size(trunk.buffers())

    def part(kind: str, whole: int) -> int:
        if backend not in SPREAD[kind]:
            return whole
        return 0 if _offloaded(recipe, backend, kind) and not host else -(-whole // ranks)

    copy = part("weights", size(parameters.values())) + buffers
    # until they are reduced, fsdp2 adds up the whole gradients of all micro-batches
    summed = backend == "fsdp2" and recipe.accumulation > 1
    gradients = size(trained.values()) if summed else part("gradients", size(trained.values()))
    optimizer = recipe.optimizer
    return {
        "weights": copy + size((*joint.parameters(), *joint.buffers())),
        # DeepSpeed keeps an fp32 copy of its part beside weights that are fp32 themselves
        "masters": part("optimizer", size(trained.values())) if backend.startswith("zero") else 0,
        "teacher": copy if teacher else 0,
        "ema": copy if recipe.ema else 0,
        "optimizer": part("optimizer", slots(optimizer, trained)) + slots(optimizer, own),
        "gradients": gradients + size(own.values()),
        "gathered": _gathered(trunk, recipe) if backend in SPREAD["weights"] and ranks > 1 else 0,
        "bucket": min(4 * BUCKET, size(trained.values())) if backend.startswith("zero") else 0,
    }


def _offloaded(recipe: Recipe, backend: str, kind: str) -> bool:
    """ZeRO-1 and 2 put the optimizer into host memory, the others all that they spread."""
    return recipe.sharding.offload and (kind == "optimizer" or backend in SPREAD["weights"])


def at_start(recipe: Recipe, trunk: Trunk) -> int:
    """Bytes on a GPU before the weights are spread: DeepSpeed takes one trunk after the other whole, fsdp2 a block."""
    return size(trunk.parameters()) if recipe.backend == "zero3" else 0


def _gathered(trunk: Trunk, recipe: Recipe) -> int:
    """Bytes of whole weights, and of a whole gradient, at one time."""
    blocks = [size(block.parameters()) for block in all_units(trunk)]
    largest = max(blocks, default=0)
    if not recipe.sharding.reshard_after_forward:
        return size(trunk.parameters()) + largest
    return size(trunk.parameters()) - sum(blocks) + 3 * largest


def slots(optimizer: OptimizerRecipe, trained: Mapping[str, nn.Parameter]) -> int:
    """Bytes that the optimizer keeps for these parameters."""
    if optimizer.name in ("sgd", "lars"):
        return size(trained.values()) * int(optimizer.momentum > 0)
    one = muon_pieces(trained) if optimizer.name == "muon" else {}
    return sum(p.nbytes * (1 if name in one else 2) for name, p in trained.items())


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(t.nbytes for t in tensors)
