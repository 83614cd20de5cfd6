"""open_clip's weights, in and out: CLIP's ResNets and ViTs, SigLIP's and other towers of timm, with CLIP's text tower.

OpenAI's own weights have the same names. Both ways go through one table of names, so what is read can be
written back and loads `strict=True` there. Features are equal to rounding; the temperature is no part of a
trunk and travels beside it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.models.trunk import Trunk
from pretrain.recipe import ModelRecipe, TextRecipe
from pretrain.recipe.model import OPENAI_MEAN, OPENAI_STD
from pretrain.weights.files import read_weights
from pretrain.weights.naming import TEMPERATURE, Names, Rule, copied, covered, exported, load, without
from pretrain.weights.timm import backbone_names

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
TEXT_HEAD = (Rule("text.projection.{}", "text_projection.{}"),)
"""SigLIP's, which has a bias, before CLIP's: a linear layer, not a matrix to multiply by."""
TIMM_HEAD = (Rule("image.projection.weight", "visual.head.proj.weight"),)
BESIDE = {*TEMPERATURE, "attn_mask", "input_resolution", "context_length", "vocab_size"}  # no weights of a trunk
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)

SIZES = {384: "small", 512: "medium", 768: "base", 1024: "large", 1280: "huge", 1408: "giant", 1664: "gigantic"}
"""timm's name of a ViT by its width."""
RESNETS = {
    ((3, 4, 6, 3), 64): "50", ((3, 4, 23, 3), 64): "101", ((4, 6, 10, 6), 80): "50x4", ((6, 8, 18, 8), 96): "50x16",
    ((3, 15, 36, 10), 128): "50x64",
}  # fmt: skip


def model_recipe(name: str) -> ModelRecipe:
    """Our recipe of a model by its name in open_clip's own tables, such as RN50, ViT-L-14-quickgelu, ViT-B-16-SigLIP.

    Raises:
        UserError: no such model, or one with parts that our towers have not.
    """
    from open_clip import get_model_config, list_models  # here, since it takes a third of a second

    config = get_model_config(name)
    if config is None:
        near = difflib.get_close_matches(name, list_models(), n=3)
        raise UserError(f"open_clip has no model {name!r}; near: {', '.join(near) or 'open_clip.list_models()'}")
    try:
        return _recipe(config)
    except KeyError as part:
        raise UserError(f"open_clip's {name} has {part}, for which there is no tower here") from None


def load_open_clip(trunk: Trunk, weights: Mapping[str, Tensor] | str | Path) -> Tensor | None:
    """Copy open_clip's state dict, or a file of it, into `trunk`; its logit_scale, shape (1,), or None.

    Whether the weights want gelu or quick_gelu stands in no weight file: the recipe must say it.

    Raises:
        UserError: the trunk is of no open_clip family, or names or shapes differ (all are listed).
    """
    where = str(weights) if isinstance(weights, str | Path) else "this state dict"
    named = read_weights(weights) if isinstance(weights, str | Path) else dict(weights)
    scale = named.get("logit_scale")
    load(trunk, without(flat(named), BESIDE), _all_names(trunk), where)
    return None if scale is None else scale.detach().float().reshape(1).clone()


def to_open_clip(
    trunk: Trunk, logit_scale: Tensor | float = INITIAL_LOGIT_SCALE, logit_bias: Tensor | float | None = None
) -> dict[str, Tensor]:
    """The trunk as open_clip's CLIP class loads it, `strict=True`, or for SigLIP its CustomTextCLIP; tensors are copies
    on the CPU.

    `logit_scale` (the log of the scale) is the objective's; without it CLIP's initial value is written.

    Raises:
        UserError: the trunk is of no open_clip family.
    """
    own = exported(trunk)
    found = {theirs: rule.to_theirs(own[ours]) for ours, (theirs, rule) in _all_names(trunk).items()}
    if _linear_head(trunk):
        found = {name if name.startswith("visual.") else f"text.{name}": t for name, t in found.items()}
    for name, value in {"logit_scale": logit_scale, "logit_bias": logit_bias}.items():
        if value is not None:
            found[name] = torch.as_tensor(value, dtype=torch.float32).reshape(())
    return copied(found)


def names(trunk: Trunk, timm_tower: bool) -> Names:
    """Their names for all of the trunk that open_clip has, in models with its own image towers or with timm's."""
    found = covered(trunk.state_dict(), _rules(trunk, timm_tower))
    return found | backbone_names(trunk, "visual.trunk.") if timm_tower else found


def flat(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of open_clip's CustomTextCLIP (`text.transformer…`) as its CLIP class has them."""
    return {name.removeprefix("text."): t for name, t in named.items()}


def _all_names(trunk: Trunk) -> Names:
    if trunk.text is None:
        raise UserError("open_clip's models have a text tower; this trunk has none")
    own_tower = "_clip" in trunk.image.name and trunk.image.name.startswith(("vit_", "resnet"))
    found = names(trunk, not own_tower)
    if uncovered := next((name for name in exported(trunk) if name not in found), None):
        raise UserError(f"{trunk.image.name} is no tower of open_clip's: it has {uncovered}, which open_clip has not")
    return {ours: found[ours] for ours in exported(trunk)}


def _rules(trunk: Trunk, timm_tower: bool) -> tuple[Rule, ...]:
    image = TIMM_HEAD if timm_tower else VIT if trunk.image.projection is not None else RESNET
    return (*image, *(TEXT_HEAD if _linear_head(trunk) else ()), *TEXT)


def _linear_head(trunk: Trunk) -> bool:
    return trunk.text is not None and trunk.text.projection.bias is not None


def _recipe(config: dict[str, Any]) -> ModelRecipe:
    vision, text = config["vision_cfg"], config["text_cfg"]
    for section, known in ((vision, VISION_KEYS), (text, TEXT_KEYS)):
        if other := next((key for key in section if key not in known), None):
            raise KeyError(other)
    siglip = text.get("pool_type") == "last"
    quick, tanh = config.get("quick_gelu", False), text.get("act_kwargs", {}).get("approximate") == "tanh"
    image, kwargs = _tower(vision)
    return ModelRecipe(
        image=image,
        image_kwargs=kwargs,
        image_size=vision["image_size"],
        embed_dim=None if vision.get("timm_proj") == "none" else config["embed_dim"],
        activation="quick_gelu" if quick else "gelu",
        text=TextRecipe(
            width=text["width"], layers=text["layers"], heads=text["heads"], context=text["context_length"],
            vocab=text["vocab_size"], causal=not text.get("no_causal_mask", False), pool="last" if siglip else "eot",
            projection_bias=text.get("proj_bias", False), activation="gelu_tanh" if tanh else None,
            norm_eps=text.get("norm_kwargs", {}).get("eps", 1e-5),
        ),
        mean=(0.5, 0.5, 0.5) if siglip else OPENAI_MEAN,
        std=(0.5, 0.5, 0.5) if siglip else OPENAI_STD,
    )  # fmt: skip


VISION_KEYS = {
    "image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "timm_model_name",
    "timm_model_pretrained", "timm_pool", "timm_proj",
}  # fmt: skip
TEXT_KEYS = {
    "context_length", "vocab_size", "width", "heads", "layers", "hf_tokenizer_name", "tokenizer_kwargs",
    "no_causal_mask", "proj_bias", "pool_type", "norm_kwargs", "act_kwargs",
}  # fmt: skip


def _tower(vision: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """timm's name and arguments of an open_clip image tower; KeyError where there are none."""
    if "timm_model_name" in vision:
        if vision["timm_proj"] is None:
            raise KeyError("a projection inside its tower")
        return vision["timm_model_name"], {}
    width, patch, layers = vision["width"], vision["patch_size"], vision["layers"]
    if isinstance(layers, list):
        return f"resnet{RESNETS[tuple(layers), width]}_clip", {}
    if timm.is_model(name := f"vit_{SIZES.get(width)}_patch{patch}_clip_224"):
        return name, {}
    size = {"embed_dim": width, "depth": layers, "num_heads": width // vision.get("head_width", 64)}
    return "vit_base_patch16_clip_224", {**size, "patch_size": patch, "mlp_ratio": vision.get("mlp_ratio", 4.0)}
