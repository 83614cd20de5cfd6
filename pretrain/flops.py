"""Flops of a training step, counted on torch's meta device: what `telemetry.mfu` sets against the device's peak."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pretrain.models.request import FeatureRequest, Input
from pretrain.parts import build_modules
from pretrain.probe import ROWS, AsOnGpu, freeze_unreached, probe_inputs, run_probe
from pretrain.reader import Batch
from pretrain.recipe import Recipe


def step_flops(recipe: Recipe, samples: int, batch: Batch) -> float:
    """Model flops of one optimizer step over all ranks; captions are taken to be as long as those of `batch`.

    Of the towers, forward and backward; a locked part has no backward, a teacher none, and what is computed a second
    time (checkpointed blocks, cached features) counts once. The objectives' heads are left out: they are small.
    """
    with torch.device("meta"):
        trunk, joint, _ = build_modules(recipe, samples, 0, 1)
    inputs = probe_inputs(joint, recipe, caption_tokens(batch))
    freeze_unreached(trunk, inputs)
    return recipe.global_batch * _flops(trunk, inputs) / ROWS


def caption_tokens(batch: Batch) -> int:
    """Mean number of tokens of the captions that are there, rounded up; at least 1."""
    lengths = [n for tokens in batch.tokens.values() for n in (tokens > 0).sum(dim=1).tolist() if n]
    return math.ceil(sum(lengths) / len(lengths)) if lengths else 1


def _flops(trunk: nn.Module, inputs: dict[FeatureRequest, Input]) -> int:
    """Of a forward of ROWS rows, and of its backward as far as weights are trained."""
    taught = {r: x for r, x in inputs.items() if not r.teacher}
    teaching = {r: x for r, x in inputs.items() if r.teacher}
    weights = [p for p in trunk.parameters() if p.requires_grad]
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter, AsOnGpu(bf16=False):
        features = [f for f in run_probe(trunk, taught).values() if f.requires_grad]
        zeros = [torch.zeros_like(f) for f in features]
        torch.autograd.grad(features, weights, zeros, allow_unused=True)
        if teaching:
            with torch.no_grad():
                run_probe(trunk, teaching)
    return counter.get_total_flops()


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    return 2 * sdpa_flop_count(query, key, value)  # scores that the kernel computes again are not the model's


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""The attention that the meta device stands in with, which torch has no count for."""
