"""What a rank's GPU must hold, counted rather than guessed: one micro-batch on torch's meta device, without memory.

The tensors that autograd keeps for the backward are counted by their storages, weights left out.

Not counted: what a backward holds for a moment, the allocator's gaps, the CUDA context, cuDNN's workspaces.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models.request import FeatureRequest
from pretrain.models.trunk import Trunk
from pretrain.objectives.base import Features
from pretrain.objectives.joint import Joint
from pretrain.probe import ROWS, AsOnGpu, probe_inputs, run_probe
from pretrain.reader import Batch
from pretrain.recipe import OptimizerRecipe, Recipe


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
        apart = {tensor.untyped_storage()._cdata for tensor in without}
        return sum(storage.nbytes() for address, storage in self._saved.items() if address not in apart)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known and tensor.dtype != torch.uint8:
            self._saved[storage._cdata] = storage
        return tensor


def towers(trunk: Trunk, joint: Joint, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """What the towers cost: activations in bytes a sample, weights once more in bf16, a forward's MFLOPs a sample.

    trunk: on the meta device. tokens: of a caption.
    """
    asked, bf16 = joint.requests(), recipe.precision == "bf16"
    inputs = probe_inputs(joint, recipe, tokens)
    found: dict[str, Any] = {"activations": 0, "cast_weights": 0, "mflops": {}}
    for tower, teacher in dict.fromkeys((r.tower, r.teacher) for r in asked):
        part = {r: inputs[r] for r in asked if (r.tower, r.teacher) == (tower, teacher)}
        cost = forward(trunk, part, bf16=bf16, graph=not teacher)
        found["activations"] += cost.saved // ROWS
        found["cast_weights"] += cost.cast_weights
        found["mflops"][f"{tower} (teacher)" if teacher else tower] = round(cost.flops / ROWS / 1e6)
    return found


class Cost(NamedTuple):
    """Of one forward."""

    saved: int
    """Bytes that autograd keeps for the backward, weights left out."""
    cast_weights: int
    """Bytes of the weights that autocast keeps in bf16."""
    flops: int


def forward(trunk: nn.Module, inputs: dict[FeatureRequest, Any], *, bf16: bool, graph: bool = True) -> Cost:
    """What one forward costs; on the meta device it is not computed."""
    flops, gpu = FlopCounterMode(display=False), AsOnGpu(bf16)
    with torch.set_grad_enabled(graph), flops, gpu, SavedBytes([*trunk.parameters(), *trunk.buffers()]) as saved:
        run_probe(trunk, inputs)
    casts = list(gpu.casts.values())
    return Cost(saved.bytes(without=casts), sum(c.nbytes for c in casts), flops.get_total_flops())


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


def rank(
    recipe: Recipe, trunk: Trunk, joint: Joint, cost: dict[str, Any], state: dict[str, int], *, world: int
) -> dict[str, Any]:
    """What a rank's GPU holds when a micro-batch's backward begins, in bytes by kind, and in all."""
    local = recipe.global_batch / world
    micro = local / recipe.accumulation
    side = sum(view.size**2 for view in joint.image_views(recipe.model.image_size))
    own = heads(trunk, joint)
    found = {f"{name}_bytes": n for name, n in state.items() if n}
    found["bf16_weights_bytes"] = cost["cast_weights"]
    found["pixels_bytes"] = round(local * 3 * side) * 2  # the batch, and the next one coming
    found["features_bytes"] = round(_features(trunk, joint, local, recipe.global_batch if world > 1 else local))
    found["heads_bytes"] = round((own or 0) * local)
    found["activations_bytes"] = round(cost["activations"] * micro)
    return {**{name: n for name, n in found.items() if n}, "total_bytes": sum(found.values())}


def _features(trunk: Trunk, joint: Joint, local: float, everyone: float) -> float:
    """Features and their gradients in fp32, the texts of all ranks too: losses over the global batch gather them."""
    wide = {"pooled": trunk.pooled_dim}
    numbers = sum(
        (everyone if r.tower == "text" else local) * wide.get(r.output, trunk.embed_dim) for r in joint.requests()
    )
    return 2 * 4 * numbers


def advice(recipe: Recipe, room: dict[str, Any], gpu_bytes: int, reserve: float, world: int) -> str:
    """That it does not fit, and what would."""
    gib, fixed = 2**30, room["total_bytes"] - room["activations_bytes"]
    said = f"a rank needs about {room['total_bytes'] / gib:.1f} GiB"
    said += f", more than {reserve:.0%} of a GPU of {gpu_bytes / gib:g} GiB"
    left = reserve * gpu_bytes - fixed
    local = recipe.global_batch // world
    whole = room["activations_bytes"] * recipe.accumulation  # of the local batch
    fits = next((k for k in range(1, local + 1) if local % k == 0 and whole / k <= left), None)
    if fits is None:
        return f"{said}; no accumulation makes it fit ({fixed / gib:.1f} GiB stay): more ranks, or a smaller model"
    bf16 = ", or perhaps precision=bf16" if recipe.precision == "fp32" else ""
    return f"{said}: accumulation={fits} would fit{bf16}; or more ranks"


def held(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def trained(module: nn.Module) -> int:
    """Bytes of the parameters that are trained: as many are the gradients."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def optimizer_copies(optimizer: OptimizerRecipe) -> int:
    """Tensors the optimizer keeps for every trained one."""
    return 2 if optimizer.name == "adamw" else int(optimizer.momentum > 0)


def _meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")
