"""How the towers are computed, the recipe's `compute`: what comes out is the same up to rounding.

A block's `forward` is replaced on the block itself: parameters keep their names, and hooks of a sharding backend stay
outside. What replaces it are partials of plain functions over the block, so that a deep copy of the trunk (a momentum
teacher) runs the copy's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.backends import cuda
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pretrain.distributed.syncbn import SyncBatchNorm, frozen_statistics
from pretrain.errors import UserError
from pretrain.models.lock import blocks_of
from pretrain.models.text import TextBlock
from pretrain.models.trunk import Trunk
from pretrain.recipe import Recipe

_KERNELS: dict[str, Callable[[bool], None]] = {
    "flash": cuda.enable_flash_sdp,
    "efficient": cuda.enable_mem_efficient_sdp,
    "cudnn": cuda.enable_cudnn_sdp,
    "math": cuda.enable_math_sdp,
}
AUTOCAST = {"auto": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What the towers compute in; auto: no launcher asked for anything."""
_VARIANTS = 64
"""Compiled forms a block may have: sizes of crops, with and without a graph, with and without dropout."""


def apply(trunk: Trunk, recipe: Recipe, device: torch.device) -> None:
    """Have `trunk` computed on `device` as `recipe.compute` says; once, before a backend takes it over.

    Raises:
        UserError: the attention kernel does not run here for these towers, or nothing can be compiled.
    """
    wanted = recipe.compute
    use_attention(wanted.attention)
    if wanted.attention != "auto":
        _try_attention(trunk, recipe, device)
    if not wanted.channels_last:
        trunk.image.lay_out(torch.contiguous_format)
    if wanted.compile:
        _try_compiler(trunk, device)
        compile_blocks(trunk)
    if wanted.checkpoint_blocks:
        checkpoint_blocks(trunk)


def units(tower: nn.Module) -> list[nn.Module]:
    """The blocks of a tower, those inside its stages where it has stages; none where it has neither."""
    found: list[nn.Module] = []
    for block in blocks_of(tower)[1]:
        inside = list(block.children()) if isinstance(block, nn.Sequential) else blocks_of(block)[1]
        found += inside or [block]
    return found


def all_units(trunk: Trunk) -> list[nn.Module]:
    """The blocks of both towers."""
    towers = [trunk.image.backbone, *([trunk.text] if trunk.text else [])]
    return [block for tower in towers for block in units(tower)]


def checkpoint_blocks(trunk: Trunk) -> None:
    """Keep what enters a block, and compute its inside again in the backward (Chen et al. 2016), with its draws."""
    for block in all_units(trunk):
        twice = any(isinstance(m, _BatchNorm) for m in block.modules())
        _replace(block, partial(_checkpointed, block, block.forward, twice))


def _checkpointed(block: nn.Module, forward: Callable, has_statistics: bool, *args: Any, **kwargs: Any) -> Any:
    extra: dict[str, Any] = {"context_fn": partial(_counted_once, block)} if has_statistics else {}
    return checkpoint(forward, *args, use_reentrant=False, **extra, **kwargs)


def _counted_once(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Around the first and the second run: BatchNorm counts the batch in the first alone."""
    return nullcontext(), frozen_statistics(block)


def compile_blocks(trunk: Trunk) -> None:
    """torch.compile of every block, one compiled form for all blocks of a kind."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    for block in all_units(trunk):
        _replace(block, partial(_compiled(type(block)), block))  # type: ignore[arg-type]


@cache
def _compiled(kind: Any) -> Callable:
    # captions make another shape each step, crops a few; with eager's draws a second pass repeats the first
    dynamic = True if kind is TextBlock else None
    return torch.compile(kind.forward, dynamic=dynamic, options={"fallback_random": True})


def use_attention(kernel: str) -> None:
    """Let `scaled_dot_product_attention` take this kernel alone, in the whole process: a block that is run again in
    the backward, outside of the trunk's forward, must take the same. auto: torch's choice."""
    for name, enable in _KERNELS.items():
        enable(kernel in ("auto", name))


def _try_attention(trunk: Trunk, recipe: Recipe, device: torch.device) -> None:
    """One tiny attention of each kind that the towers have, there and back."""
    dtype = AUTOCAST[recipe.precision] or torch.float32
    for whose, heads, width, causal, masked in dict.fromkeys(_attentions(trunk, recipe)):
        x = torch.zeros(1, heads, 4, width, device=device, dtype=dtype, requires_grad=True)
        mask = torch.ones(1, 1, 1, 4, device=device, dtype=torch.bool) if masked else None
        try:
            F.scaled_dot_product_attention(x, x, x, attn_mask=mask, is_causal=causal).sum().backward()
        except RuntimeError as error:
            use_attention("auto")
            raise UserError(
                f"compute.attention: {recipe.compute.attention} does not run on {device.type} for {whose} ({heads} "
                f"heads of {width}, {str(dtype).removeprefix('torch.')}): {str(error).splitlines()[0]} Choose another "
                "kernel, or auto"
            ) from None


def _attentions(trunk: Trunk, recipe: Recipe) -> Iterator[tuple[str, int, int, bool, bool]]:
    """(whose, heads, width of a head, causal, masked)"""
    for module in trunk.image.modules():
        heads, width = getattr(module, "num_heads", None), getattr(module, "head_dim", None)
        if heads and width:
            yield "the image tower", heads, width, False, False
            if recipe.model.regions:
                yield "regions, whose places are masked", heads, width, False, True
    for block in trunk.text.blocks if trunk.text else ():
        yield "the text tower", block.heads, block.qkv.in_features // block.heads, block.causal, False


def _try_compiler(trunk: Trunk, device: torch.device) -> None:
    """Compile one line: whether there is a compiler is known by compiling."""
    if any(isinstance(m, SyncBatchNorm) for block in all_units(trunk) for m in block.modules()):
        raise UserError(
            "compute.compile: BatchNorm over the ranks communicates in the middle of a block, which cannot be "
            "compiled; set model.sync_batchnorm: false, or compute.compile: false"
        )
    try:
        torch.compile(_a_line)(torch.zeros(8, device=device))
    except Exception as error:  # of whichever stage of the compiler
        said = str(error).strip().splitlines()[0]
        raise UserError(
            f"compute.compile: torch cannot compile on {device.type} here ({said}). It needs a C++ compiler, g++ or "
            "what CXX names, on a GPU triton too; install it, or set compute.compile: false"
        ) from None


def _a_line(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def _replace(block: Any, forward: Callable) -> None:
    block.forward = forward
