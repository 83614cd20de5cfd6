"""What a rank's GPU must hold, counted rather than guessed: one micro-batch on torch's meta device, without memory.

A forward on the meta device goes through every layer and computes nothing, so a ViT-bigG takes seconds. The tensors
that autograd keeps for the backward are counted by their storages, weights left out. Two things the meta device does
not do by itself are done here as a GPU does them: attention that keeps no matrix of scores, and autocast to bf16.

Not counted: what a backward holds for a moment, the allocator's gaps, the CUDA context, cuDNN's workspaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from pretrain.errors import UserError
from pretrain.models.request import FeatureRequest, RegionInput
from pretrain.models.trunk import Trunk
from pretrain.objectives.base import Features
from pretrain.objectives.joint import Joint
from pretrain.reader import Batch
from pretrain.recipe import OptimizerRecipe, Recipe
from pretrain.views.regions import Regions

ROWS = 2  # of the micro-batch that is measured; everything but the weights grows in proportion

_LOW = {F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, torch.einsum}
_FULL = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, F.normalize}
"""What CUDA's autocast runs in bf16, and what in fp32, of the operations that towers are made of."""


class AsOnGpu(TorchFunctionMode):
    """Attention without its matrix of scores, and with `bf16` the casts of CUDA's autocast, on the meta device.

    Tensors that are real because they decide shapes (token ids, masks) go along where they meet one of the meta device.
    """

    def __init__(self, bf16: bool) -> None:
        super().__init__()
        self.bf16 = bf16
        self.casts: dict[int, Tensor] = {}
        """Weights in bf16, by the id of the weight: autocast casts each once a forward and keeps it."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = _together(args, kwargs or {})
        if self.bf16 and (func in _LOW or func is F.scaled_dot_product_attention):
            args, kwargs = tree_map(self._low, (args, kwargs))
        elif self.bf16 and func in _FULL:
            args, kwargs = tree_map(lambda x: x.float() if _is_float(x) else x, (args, kwargs))
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _low(self, x: Any) -> Any:
        if not _is_float(x) or x.dtype == torch.bfloat16:
            return x
        if not isinstance(x, nn.Parameter):
            return x.bfloat16()
        if id(x) not in self.casts:
            self.casts[id(x)] = x.bfloat16()
        return self.casts[id(x)]


def _together(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, kwargs))):
        return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
    return args, kwargs


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(q.dtype)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, dropout_p, is_causal, attn_mask=attn_mask)[0]


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


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
    inputs = _inputs(joint, recipe, tokens)
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
        _run(trunk, inputs)
    casts = list(gpu.casts.values())
    return Cost(saved.bytes(without=casts), sum(c.nbytes for c in casts), flops.get_total_flops())


def _run(trunk: nn.Module, inputs: dict[FeatureRequest, Any]) -> None:
    try:
        trunk(inputs)
    except (RuntimeError, IndexError) as error:
        raise UserError(f"model: the towers cannot be run as they are built: {str(error).splitlines()[0]}") from error


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


def _inputs(joint: Joint, recipe: Recipe, tokens: int) -> dict[FeatureRequest, Any]:
    """ROWS rows of everything that is asked: images on the meta device, texts and boxes real (they decide shapes)."""
    images = {
        view.name: torch.empty(ROWS, 3, view.size, view.size, dtype=torch.uint8, device="meta")
        for view in joint.image_views(recipe.model.image_size)
    }
    line = F.pad(torch.arange(1, tokens + 1), (0, _context(recipe) - tokens))  # the highest id is the end
    text = line.expand(ROWS, -1)
    regions = {view.name: view for view in joint.region_views()}
    inputs: dict[FeatureRequest, Any] = {}
    for request in joint.requests():
        if request.output == "regions":
            view = regions[request.view]
            inputs[request] = RegionInput(_regions(view.most, view.stored_dim), view.of, images[view.of])
        else:
            inputs[request] = images[request.view] if request.tower == "image" else text
    return inputs


def _context(recipe: Recipe) -> int:
    return recipe.model.text.context if recipe.model.text else 0


def _regions(most: int, stored_dim: int | None) -> Regions:
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(ROWS, most, 4)
    features = torch.zeros(ROWS, most, stored_dim + 4 if stored_dim else 0, dtype=torch.float16)
    return Regions(boxes, features, torch.ones(ROWS, most, dtype=torch.bool))


def _meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")
