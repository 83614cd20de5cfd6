"""What a rank's GPU must hold, counted rather than guessed: one micro-batch on torch's meta device, without memory.

The tensors that autograd keeps for the backward are counted by their storages, weights left out; `sharding` adds what
stays from step to step.

Not counted: what a backward holds for a moment, the allocator's gaps, the CUDA context, cuDNN's workspaces.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.check import sharding
from pretrain.models.compute import all_units
from pretrain.models.request import FeatureRequest
from pretrain.models.trunk import Trunk
from pretrain.objectives.base import Features
from pretrain.objectives.joint import Joint
from pretrain.parts import build_modules
from pretrain.probe import ROWS, AsOnGpu, freeze_unreached, probe_inputs, run_probe
from pretrain.reader import Batch
from pretrain.recipe import Recipe


class SavedBytes:
    """Counts what autograd keeps while it is entered; `weights` are there anyway."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = list(weights)
        self._known = {w.untyped_storage()._cdata for w in self._weights}
        self._saved: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is given out twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def bytes(self, without: Iterable[Tensor] = ()) -> int:
        """What is kept, apart from these."""
        return sum(self.storages(without).values())

    def storages(self, without: Iterable[Tensor] = ()) -> dict[int, int]:
        """Bytes of each storage that is kept, by its address, apart from these."""
        apart = {tensor.untyped_storage()._cdata for tensor in without}
        return {address: s.nbytes() for address, s in self._saved.items() if address not in apart}

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known and tensor.dtype != torch.uint8:
            self._saved[storage._cdata] = storage
        return tensor


class InBlocks:
    """What of a `SavedBytes` is kept inside of blocks, and what enters them, while this is entered."""

    def __init__(self, saved: SavedBytes, blocks: Iterable[nn.Module]) -> None:
        self._saved, self._blocks = saved, list(blocks)
        self._before: set[int] = set()
        self._inside: list[set[int]] = []
        self._entering: dict[int, torch.UntypedStorage] = {}

    def __enter__(self) -> InBlocks:
        self._hooks = [block.register_forward_pre_hook(self._enter) for block in self._blocks]
        self._hooks += [block.register_forward_hook(self._leave) for block in self._blocks]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._before = set(self._saved.storages())
        storage = inputs[0].untyped_storage()
        self._entering[storage._cdata] = storage

    def _leave(self, block: nn.Module, *_: Any) -> None:
        self._inside.append(self._saved.storages().keys() - self._before)

    def bytes(self, without: Iterable[Tensor]) -> tuple[int, int]:
        """(what is kept where only what enters a block is, the most that is kept inside one), apart from these."""
        kept = self._saved.storages(without)
        inside = [sum(kept.get(address, 0) for address in one) for one in self._inside]
        entering = {a: s.nbytes() for a, s in self._entering.items()} if sum(inside) else {}
        outside = {a: n for a, n in kept.items() if not any(a in one for one in self._inside)}
        return sum((outside | entering).values()), max(inside, default=0)


@dataclass
class Modules:
    """What a run is made of, on the meta device."""

    trunk: Trunk
    joint: Joint
    teacher: bool
    tokens: int = 0
    """Of a caption."""
    _costs: dict[bool, dict[str, Any]] = field(default_factory=dict)

    def cost(self, recipe: Recipe) -> dict[str, Any]:
        """What the towers cost a sample in the recipe's precision; counted once."""
        low = recipe.precision in ("bf16", "fp16")
        if low not in self._costs:
            self._costs[low] = towers(self.trunk, self.joint, recipe, self.tokens)
        return self._costs[low]


def build(recipe: Recipe, samples: int, world: int) -> Modules:
    """The modules of a run on `world` ranks; how long its captions are is not known yet.

    Raises:
        UserError: what cannot be built, or two objectives that disagree on a view.
    """
    with torch.device("meta"):
        trunk, joint, teacher = build_modules(recipe, samples, 0, world)
    joint.image_views(recipe.model.image_size)
    joint.text_views()
    joint.region_views()
    context = recipe.model.text.context if recipe.model.text else 0
    freeze_unreached(trunk, probe_inputs(joint, recipe, context))
    return Modules(trunk, joint, teacher)


def towers(trunk: Trunk, joint: Joint, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """What the towers cost: activations in bytes a sample (in all; where blocks are checkpointed; inside the largest
    block), weights once more in bf16, a forward's MFLOPs a sample.

    trunk: on the meta device. tokens: of a caption.
    """
    asked, low = joint.requests(), recipe.precision in ("bf16", "fp16")
    inputs = probe_inputs(joint, recipe, tokens)
    found: dict[str, Any] = dict.fromkeys(("activations", "checkpointed", "largest_block", "cast_weights"), 0)
    found["mflops"] = {}
    for tower, teacher in dict.fromkeys((r.tower, r.teacher) for r in asked):
        part = {r: inputs[r] for r in asked if (r.tower, r.teacher) == (tower, teacher)}
        cost = forward(trunk, part, bf16=low, graph=not teacher)
        found["activations"] += cost.saved // ROWS
        found["checkpointed"] += cost.checkpointed // ROWS
        found["largest_block"] = max(found["largest_block"], cost.largest_block // ROWS)
        found["cast_weights"] += cost.cast_weights
        found["mflops"][f"{tower} (teacher)" if teacher else tower] = round(cost.flops / ROWS / 1e6)
    return found


class Cost(NamedTuple):
    """Of one forward."""

    saved: int
    """Bytes that autograd keeps for the backward, weights left out."""
    checkpointed: int
    """Those bytes where a block keeps what enters it alone."""
    largest_block: int
    """The most of `saved` that one block keeps inside."""
    cast_weights: int
    """Bytes of the weights that autocast keeps in bf16."""
    flops: int


def forward(trunk: Trunk, inputs: dict[FeatureRequest, Any], *, bf16: bool, graph: bool = True) -> Cost:
    """What one forward costs; on the meta device it is not computed."""
    flops, gpu = FlopCounterMode(display=False), AsOnGpu(bf16)
    saved = SavedBytes([*trunk.parameters(), *trunk.buffers()])
    with torch.set_grad_enabled(graph), flops, gpu, saved, InBlocks(saved, all_units(trunk)) as blocks:
        run_probe(trunk, inputs)
    casts = list(gpu.casts.values())
    return Cost(
        saved.bytes(without=casts), *blocks.bytes(without=casts), sum(c.nbytes for c in casts), flops.get_total_flops()
    )


def heads(trunk: Trunk, joint: Joint) -> int | None:
    """Bytes a sample that the objectives keep between features and loss; None where only a real step could tell.

    The contrastive losses are of this kind, and keep no more than the features.
    """
    features: Features = {
        r: _meta(ROWS, trunk.pooled_dim if r.output == "pooled" else trunk.embed_dim).requires_grad_(not r.teacher)
        for r in joint.requests()
    }
    number = torch.empty(ROWS, dtype=torch.long, device="meta")
    batch = Batch(0, number, number, number, [""] * ROWS, _meta(ROWS), number, images={}, tokens={}, captions={})
    saved = SavedBytes([*joint.parameters(), *joint.buffers()])
    try:
        with saved:
            joint.loss(features, batch, None)
    except (RuntimeError, NotImplementedError, KeyError):  # a number is asked of a tensor that has none
        return None
    return saved.bytes() // ROWS


def rank(recipe: Recipe, modules: Modules, *, world: int, host: bool = False) -> dict[str, Any]:
    """What a rank's GPU holds when a micro-batch's backward begins, in bytes by kind, and in all; or at the start,
    where that is more.

    host: the towers run in host memory, so nothing can be offloaded to it.
    """
    joint, cost = modules.joint, modules.cost(recipe)
    local = recipe.global_batch / world
    micro = local / recipe.accumulation
    side = sum(view.size**2 for view in joint.image_views(recipe.model.image_size))
    own = heads(modules.trunk, joint)
    state = sharding.state(recipe, modules.trunk, joint, modules.teacher, world=world, host=host)
    again = recipe.compute.checkpoint_blocks
    found = {f"{name}_bytes": n for name, n in state.items() if n}
    found["bf16_weights_bytes"] = cost["cast_weights"]
    found["pixels_bytes"] = round(local * 3 * side) * 2  # the batch, and the next one coming
    everyone = recipe.global_batch if world > 1 else local
    found["features_bytes"] = round(_features(modules.trunk, joint, local, everyone))
    found["heads_bytes"] = round((own or 0) * local)
    found["activations_bytes"] = round((cost["checkpointed"] if again else cost["activations"]) * micro)
    found["one_block_again_bytes"] = round(cost["largest_block"] * micro) if again else 0
    total = max(sum(found.values()), sharding.at_start(recipe, modules.trunk))
    return {**{name: n for name, n in found.items() if n}, "total_bytes": total}


def _features(trunk: Trunk, joint: Joint, local: float, everyone: float) -> float:
    """Features and their gradients in fp32, the texts of all ranks too: losses over the global batch gather them."""
    wide = {"pooled": trunk.pooled_dim}
    numbers = sum(
        (everyone if r.tower == "text" else local) * wide.get(r.output, trunk.embed_dim) for r in joint.requests()
    )
    return 2 * 4 * numbers


def _meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")
