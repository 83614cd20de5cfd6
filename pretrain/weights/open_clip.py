"""open_clip's weights, in and out: CLIP's ResNets and ViTs with the standard text tower.

OpenAI's own weights have the same names. Both ways go through one table of names, so what is read can be
written back and loads `strict=True` there. Features are equal to rounding; the temperature is no part of a
trunk and travels beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.models.trunk import Trunk
from pretrain.recipe import ModelRecipe, TextRecipe
from pretrain.weights.files import read_weights
from pretrain.weights.naming import Rule, load, table

VIT = (
    Rule("image.backbone.cls_token", "visual.class_embedding", "lead 2"),
    Rule("image.backbone.pos_embed", "visual.positional_embedding", "lead 1"),
    Rule("image.backbone.patch_embed.proj.weight", "visual.conv1.weight"),
    Rule("image.backbone.norm_pre.{}", "visual.ln_pre.{}"),
    Rule("image.backbone.blocks.{}.norm1.{}", "visual.transformer.resblocks.{}.ln_1.{}"),
    Rule("image.backbone.blocks.{}.attn.qkv.{}", "visual.transformer.resblocks.{}.attn.in_proj_{}"),
    Rule("image.backbone.blocks.{}.attn.proj.{}", "visual.transformer.resblocks.{}.attn.out_proj.{}"),
    Rule("image.backbone.blocks.{}.norm2.{}", "visual.transformer.resblocks.{}.ln_2.{}"),
    Rule("image.backbone.blocks.{}.mlp.fc1.{}", "visual.transformer.resblocks.{}.mlp.c_fc.{}"),
    Rule("image.backbone.blocks.{}.mlp.fc2.{}", "visual.transformer.resblocks.{}.mlp.c_proj.{}"),
    Rule("image.backbone.norm.{}", "visual.ln_post.{}"),
    Rule("image.projection.weight", "visual.proj", "transpose"),
)
RESNET = (
    Rule("image.backbone.stem.conv1.conv.weight", "visual.conv1.weight"),
    Rule("image.backbone.stem.conv1.bn.{}", "visual.bn1.{}"),
    Rule("image.backbone.stem.conv2.conv.weight", "visual.conv2.weight"),
    Rule("image.backbone.stem.conv2.bn.{}", "visual.bn2.{}"),
    Rule("image.backbone.stem.conv3.conv.weight", "visual.conv3.weight"),
    Rule("image.backbone.stem.conv3.bn.{}", "visual.bn3.{}"),
    *(
        rule
        for stage in range(4)  # theirs count from 1
        for ours, theirs in [(f"image.backbone.stages.{stage}.{{}}", f"visual.layer{stage + 1}.{{}}")]
        for rule in (
            Rule(f"{ours}.conv1_1x1.conv.weight", f"{theirs}.conv1.weight"),
            Rule(f"{ours}.conv1_1x1.bn.{{}}", f"{theirs}.bn1.{{}}"),
            Rule(f"{ours}.conv2_kxk.conv.weight", f"{theirs}.conv2.weight"),
            Rule(f"{ours}.conv2_kxk.bn.{{}}", f"{theirs}.bn2.{{}}"),
            Rule(f"{ours}.conv3_1x1.conv.weight", f"{theirs}.conv3.weight"),
            Rule(f"{ours}.conv3_1x1.bn.{{}}", f"{theirs}.bn3.{{}}"),
            Rule(f"{ours}.shortcut.conv.conv.weight", f"{theirs}.downsample.0.weight"),
            Rule(f"{ours}.shortcut.conv.bn.{{}}", f"{theirs}.downsample.1.{{}}"),
        )
    ),
    Rule("image.backbone.head.pos_embed", "visual.attnpool.positional_embedding"),
    Rule("image.backbone.head.q.{}", "visual.attnpool.q_proj.{}"),
    Rule("image.backbone.head.k.{}", "visual.attnpool.k_proj.{}"),
    Rule("image.backbone.head.v.{}", "visual.attnpool.v_proj.{}"),
    Rule("image.backbone.head.proj.{}", "visual.attnpool.c_proj.{}"),
)
TEXT = (
    Rule("text.token_embedding.weight", "token_embedding.weight"),
    Rule("text.positional_embedding", "positional_embedding"),
    Rule("text.blocks.{}.norm1.{}", "transformer.resblocks.{}.ln_1.{}"),
    Rule("text.blocks.{}.qkv.{}", "transformer.resblocks.{}.attn.in_proj_{}"),
    Rule("text.blocks.{}.proj.{}", "transformer.resblocks.{}.attn.out_proj.{}"),
    Rule("text.blocks.{}.norm2.{}", "transformer.resblocks.{}.ln_2.{}"),
    Rule("text.blocks.{}.fc1.{}", "transformer.resblocks.{}.mlp.c_fc.{}"),
    Rule("text.blocks.{}.fc2.{}", "transformer.resblocks.{}.mlp.c_proj.{}"),
    Rule("text.norm.{}", "ln_final.{}"),
    Rule("text.projection.weight", "text_projection", "transpose"),
)
BESIDE = {
    "logit_scale",
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
}  # no weights of a trunk
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)

TOWERS = {
    "RN50": "resnet50_clip",
    "ViT-B-32": "vit_base_patch32_clip_224",
    "ViT-B-16": "vit_base_patch16_clip_224",
}


def model_recipe(name: str) -> ModelRecipe:
    """Our recipe of an open_clip model: RN50, ViT-B-32, ViT-B-16, each also with `-quickgelu`.

    Raises:
        UserError: another name.
    """
    base = name.removesuffix("-quickgelu")
    if base not in TOWERS:
        raise UserError(f"no recipe for open_clip's {name!r}; known: {', '.join(TOWERS)}, each also with -quickgelu")
    return ModelRecipe(
        image=TOWERS[base],
        embed_dim=1024 if base == "RN50" else 512,
        text=TextRecipe(),
        activation="quick_gelu" if base != name else "gelu",
    )


def load_open_clip(trunk: Trunk, weights: Mapping[str, Tensor] | str | Path) -> Tensor | None:
    """Copy open_clip's state dict, or a file of it, into `trunk`; its logit_scale, shape (1,), or None.

    Whether the weights want gelu or quick_gelu stands in no weight file: the recipe must say it.

    Raises:
        UserError: the trunk is of no open_clip family, or names or shapes differ (all are listed).
    """
    where = str(weights) if isinstance(weights, str | Path) else "this state dict"
    named = read_weights(weights) if isinstance(weights, str | Path) else dict(weights)
    scale = named.get("logit_scale")
    towers = {_flat(name): t for name, t in named.items() if name not in BESIDE}
    load(trunk, towers, _names(trunk), where)
    return None if scale is None else scale.detach().float().reshape(1).clone()


def to_open_clip(trunk: Trunk, logit_scale: Tensor | float = INITIAL_LOGIT_SCALE) -> dict[str, Tensor]:
    """The trunk as open_clip's CLIP class loads it, `strict=True`; tensors are copies on the CPU.

    `logit_scale` (the log of the scale) is the objective's; without it CLIP's initial value is written.

    Raises:
        UserError: the trunk is of no open_clip family.
    """
    own = trunk.state_dict()
    found = {
        theirs: rule.to_theirs(own[ours]).detach().cpu().clone(memory_format=torch.contiguous_format)
        for ours, (theirs, rule) in _names(trunk).items()
    }
    return found | {"logit_scale": torch.as_tensor(logit_scale, dtype=torch.float32).detach().cpu().reshape(())}


def _names(trunk: Trunk) -> dict[str, tuple[str, Rule]]:
    if trunk.text is None:
        raise UserError("open_clip's models have a text tower; this trunk has none")
    rules = VIT if trunk.image.projection is not None else RESNET
    try:
        return table(trunk.state_dict(), rules + TEXT)
    except KeyError as name:
        raise UserError(
            f"{trunk.image.name} is no tower of open_clip's: it has {name}, which open_clip has not"
        ) from None


def _flat(name: str) -> str:
    """Names of open_clip's CustomTextCLIP (`text.transformer…`) as its CLIP class has them."""
    return name.removeprefix("text.") if name.startswith("text.") else name
