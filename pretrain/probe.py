"""A trunk run without computing anything: a few rows on torch's meta device, which goes through every layer and needs
no memory, so a ViT-bigG takes seconds. What it costs (`pretrain.check.memory`) and which of its parameters the
objectives reach can be told before anything is placed, sharded or started.

Two things the meta device does not do by itself are done here as a GPU does them: attention that keeps no matrix of
scores, and autocast to bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from pretrain.errors import UserError
from pretrain.models.request import FeatureRequest, Input, RegionInput
from pretrain.models.trunk import Trunk
from pretrain.objectives.joint import Joint
from pretrain.recipe import Recipe
from pretrain.views.regions import Regions

ROWS = 2

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


def probe_inputs(joint: Joint, recipe: Recipe, tokens: int) -> dict[FeatureRequest, Input]:
    """ROWS rows of everything that is asked: images on the meta device, texts of so many tokens and boxes real, for
    they decide shapes."""
    images = {
        view.name: torch.empty(ROWS, 3, view.size, view.size, dtype=torch.uint8, device="meta")
        for view in joint.image_views(recipe.model.image_size)
    }
    context = recipe.model.text.context if recipe.model.text else 0
    line = F.pad(torch.arange(1, tokens + 1), (0, context - tokens))  # the highest id is the end
    text = line.expand(ROWS, -1)
    regions = {view.name: view for view in joint.region_views()}
    inputs: dict[FeatureRequest, Input] = {}
    for request in joint.requests():
        if request.output == "regions":
            view = regions[request.view]
            inputs[request] = RegionInput(_regions(view.most, view.stored_dim), view.of, images[view.of])
        else:
            inputs[request] = images[request.view] if request.tower == "image" else text
    return inputs


def run_probe(trunk: nn.Module, inputs: dict[FeatureRequest, Input]) -> dict[FeatureRequest, Tensor]:
    """The features of `inputs` from a trunk on the meta device; UserError where its parts do not fit."""
    try:
        return trunk(inputs)
    except (RuntimeError, IndexError) as error:
        raise UserError(f"model: the towers cannot be run as they are built: {str(error).splitlines()[0]}") from error


def freeze_unreached(trunk: Trunk, inputs: dict[FeatureRequest, Input]) -> list[str]:
    """Freeze the parameters that no feature of `inputs` depends on, such as a text tower where no objective reads
    texts; their names.

    A gradient for them never comes: DDP would wait for it for ever, ZeRO would decay their weights all the same.
    """
    inputs = {r: x for r, x in inputs.items() if not r.teacher}
    trained = {n: p for n, p in trunk.named_parameters() if p.requires_grad}
    tensors = {n: t.detach().to("meta") for n, t in (*trunk.named_parameters(), *trunk.named_buffers())}
    leaves = {n: tensors[n].requires_grad_() for n in trained}
    was_training = trunk.training
    trunk.eval()  # no statistics are updated, nothing is communicated
    try:
        with AsOnGpu(bf16=False):
            features = run_probe(lambda x: functional_call(trunk, tensors, (x,)), inputs)  # type: ignore[arg-type]
            asked = [f for f in features.values() if f.requires_grad]
            zeros = [torch.zeros_like(f) for f in asked]
            found = torch.autograd.grad(asked, list(leaves.values()), zeros, allow_unused=True)
    finally:
        trunk.train(was_training)
    unreached = [name for name, gradient in zip(leaves, found) if gradient is None]
    for name in unreached:
        trained[name].requires_grad_(False)
    return unreached


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


def _regions(most: int, stored_dim: int | None) -> Regions:
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(ROWS, most, 4)
    features = torch.zeros(ROWS, most, stored_dim + 4 if stored_dim else 0, dtype=torch.float16)
    return Regions(boxes, features, torch.ones(ROWS, most, dtype=torch.bool))
