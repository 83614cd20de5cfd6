"""Hugging Face's CLIP and SigLIP (transformers' `CLIPModel`, `SiglipModel`), in and out.

Theirs keep queries, keys and values apart, ours has them in one matrix: `joined` and `parted` go between, and one
table of names does the rest in both directions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.models.trunk import Trunk
from pretrain.recipe import ModelRecipe, TextRecipe
from pretrain.views.tokenizer import END, START
from pretrain.weights.files import read_weights
from pretrain.weights.naming import TEMPERATURE, Names, Rule, copied, covered, exported, load, table, without

BESIDE = (*TEMPERATURE, "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")

VISION = (
    Rule("image.backbone.cls_token", "vision_model.embeddings.class_embedding", "lead 2"),
    Rule("image.backbone.pos_embed", "vision_model.embeddings.position_embedding.weight", "lead 1"),
    Rule("image.backbone.patch_embed.proj.{}", "vision_model.embeddings.patch_embedding.{}"),
    Rule("image.backbone.norm_pre.{}", "vision_model.pre_layrnorm.{}"),
    Rule("image.backbone.blocks.{}.norm1.{}", "vision_model.encoder.layers.{}.layer_norm1.{}"),
    Rule("image.backbone.blocks.{}.attn.qkv.{}", "vision_model.encoder.layers.{}.self_attn.qkv.{}"),
    Rule("image.backbone.blocks.{}.attn.proj.{}", "vision_model.encoder.layers.{}.self_attn.out_proj.{}"),
    Rule("image.backbone.blocks.{}.norm2.{}", "vision_model.encoder.layers.{}.layer_norm2.{}"),
    Rule("image.backbone.blocks.{}.mlp.{}.{}", "vision_model.encoder.layers.{}.mlp.{}.{}"),
    Rule("image.backbone.norm.{}", "vision_model.post_layernorm.{}"),
    Rule("image.backbone.attn_pool.latent", "vision_model.head.probe"),
    Rule("image.backbone.attn_pool.q.{}", "vision_model.head.attention.q.{}"),
    Rule("image.backbone.attn_pool.kv.{}", "vision_model.head.attention.kv.{}"),
    Rule("image.backbone.attn_pool.proj.{}", "vision_model.head.attention.out_proj.{}"),
    Rule("image.backbone.attn_pool.norm.{}", "vision_model.head.layernorm.{}"),
    Rule("image.backbone.attn_pool.mlp.{}.{}", "vision_model.head.mlp.{}.{}"),
    Rule("image.projection.weight", "visual_projection.weight"),
)
TEXT = (
    Rule("text.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    Rule("text.positional_embedding", "text_model.embeddings.position_embedding.weight"),
    Rule("text.blocks.{}.norm1.{}", "text_model.encoder.layers.{}.layer_norm1.{}"),
    Rule("text.blocks.{}.qkv.{}", "text_model.encoder.layers.{}.self_attn.qkv.{}"),
    Rule("text.blocks.{}.proj.{}", "text_model.encoder.layers.{}.self_attn.out_proj.{}"),
    Rule("text.blocks.{}.norm2.{}", "text_model.encoder.layers.{}.layer_norm2.{}"),
    Rule("text.blocks.{}.fc1.{}", "text_model.encoder.layers.{}.mlp.fc1.{}"),
    Rule("text.blocks.{}.fc2.{}", "text_model.encoder.layers.{}.mlp.fc2.{}"),
    Rule("text.norm.{}", "text_model.final_layer_norm.{}"),
)
CLIP_TEXT = (*TEXT, Rule("text.projection.weight", "text_projection.weight"))
SIGLIP_TEXT = (*TEXT, Rule("text.projection.{}", "text_model.head.{}"))

ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh"}


def load_hf(trunk: Trunk, weights: Mapping[str, Tensor] | str | Path) -> dict[str, Tensor]:
    """Copy a state dict of CLIPModel or SiglipModel, a file of it or its folder; its temperature, each (1,), by name.

    Raises:
        UserError: the trunk is of neither family, or names or shapes differ (all are listed).
    """
    where = str(weights) if isinstance(weights, str | Path) else "this state dict"
    named = read_weights(weights) if isinstance(weights, str | Path) else weights
    load(trunk, without(joined(named), BESIDE), _all_names(trunk), where)
    return {name: named[name].detach().float().reshape(1).clone() for name in TEMPERATURE if name in named}


def to_hf(
    trunk: Trunk, model: ModelRecipe, logit_scale: Tensor | float, logit_bias: Tensor | float | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, config.json as data) that transformers' CLIPModel or SiglipModel is made of; copies on the CPU.

    `logit_scale` is the log of the scale. A trunk with SigLIP's pooling becomes a SiglipModel, which has a bias, any
    other a CLIPModel, which has none.

    Raises:
        UserError: a trunk that is neither, or an option that theirs lack.
    """
    names, siglip = _all_names(trunk), is_siglip(trunk)
    _check_options(trunk, model)
    own = exported(trunk)
    tensors = parted({theirs: rule.to_theirs(own[ours]) for ours, (theirs, rule) in names.items()})
    temperature = {"logit_scale": logit_scale} | (
        {"logit_bias": 0.0 if logit_bias is None else logit_bias} if siglip else {}
    )
    for name, value in temperature.items():
        tensors[name] = torch.as_tensor(value, dtype=torch.float32).detach().reshape(1 if siglip else ())
    return copied(tensors), _config(trunk, model, siglip)


def names(trunk: Trunk) -> Names:
    """Their names, once `joined`, for all of the trunk that either model has."""
    text = SIGLIP_TEXT if is_siglip(trunk) else CLIP_TEXT
    return covered(trunk.state_dict(), VISION + text)


def is_siglip(trunk: Trunk) -> bool:
    """Whether the image tower pools as SigLIP does: by attention, and without a projection."""
    return getattr(trunk.image.backbone, "attn_pool", None) is not None and trunk.image.projection is None


def joined(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors with queries, keys and values in one, and the pooling's queries apart from its keys and values."""
    found = dict(named)
    for name in named:
        if part := re.fullmatch(r"(.*\.self_attn)\.q_proj\.(\w+)", name):
            three = [f"{part[1]}.{letter}_proj.{part[2]}" for letter in "qkv"]
            if all(n in found for n in three):
                found[f"{part[1]}.qkv.{part[2]}"] = torch.cat([found.pop(n) for n in three])
        if part := re.fullmatch(r"(.*\.head\.attention)\.in_proj_(\w+)", name):
            q, k, v = found.pop(name).chunk(3)
            found |= {f"{part[1]}.q.{part[2]}": q, f"{part[1]}.kv.{part[2]}": torch.cat((k, v))}
    return found


def parted(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`joined` backwards."""
    found = dict(named)
    for name in named:
        if part := re.fullmatch(r"(.*\.self_attn)\.qkv\.(\w+)", name):
            three = [f"{part[1]}.{letter}_proj.{part[2]}" for letter in "qkv"]
            found |= dict(zip(three, found.pop(name).chunk(3)))
        if part := re.fullmatch(r"(.*\.head\.attention)\.q\.(\w+)", name):
            kv = found.pop(f"{part[1]}.kv.{part[2]}")
            found[f"{part[1]}.in_proj_{part[2]}"] = torch.cat((found.pop(name), kv))
    return found


def activations(trunk: Trunk) -> dict[str, str]:
    """Their name for the activation of each tower's blocks: of `vision_config` and `text_config`."""
    image: Any = getattr(trunk.image.backbone, "blocks", None)
    found = {"vision_config": image[0].mlp.act} if image is not None else {}
    if trunk.text is not None:
        found["text_config"] = trunk.text.blocks[0].act
    return {tower: _activation(act) for tower, act in found.items()}


def told_activations(folder: Path) -> dict[str, str]:
    """What a model folder's config.json says of both towers, as `activations` has it; nothing where it is of others."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    usual = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}.get(config.get("model_type", ""))  # where not said
    towers = ("vision_config", "text_config")
    return {t: config.get(t, {}).get("hidden_act", usual) for t in towers} if usual else {}


def _activation(act: nn.Module) -> str:
    name = "GELUTanh" if getattr(act, "approximate", None) == "tanh" else type(act).__name__
    return ACTIVATIONS.get(name, name)


def _all_names(trunk: Trunk) -> Names:
    if trunk.text is None:
        raise UserError("transformers' CLIPModel and SiglipModel have a text tower; this trunk has none")
    try:
        return table(exported(trunk), VISION + (SIGLIP_TEXT if is_siglip(trunk) else CLIP_TEXT))
    except KeyError as name:
        raise UserError(
            f"{trunk.image.name} is neither CLIP's nor SigLIP's ViT in transformers: it has {name}, which they have not"
        ) from None


def _check_options(trunk: Trunk, model: ModelRecipe) -> None:
    text = model.text or TextRecipe()
    if not is_siglip(trunk) and isinstance(trunk.image.backbone.norm_pre, nn.Identity):
        raise UserError(
            f"transformers' CLIPModel normalises the patches before the blocks, {trunk.image.name} does not; "
            "`--to timm`, `--to onnx` and `--to safetensors` hold this tower, CLIP's own (vit_*_clip_*) go to hf"
        )
    wanted = {"causal": False, "pool": "last"} if is_siglip(trunk) else {"causal": True, "pool": "eot"}
    for key, value in wanted.items():
        if getattr(text, key) != value:
            kind = "SiglipModel" if is_siglip(trunk) else "CLIPModel"
            raise UserError(f"model.text.{key} is {getattr(text, key)}, but transformers' {kind} knows {value} alone")


def _config(trunk: Trunk, model: ModelRecipe, siglip: bool) -> dict[str, Any]:
    vit, tower, text = trunk.image.backbone, trunk.text, model.text
    assert tower is not None
    assert text is not None
    act = activations(trunk)
    vision_config = {
        "image_size": model.image_size, "patch_size": vit.patch_embed.patch_size[0], "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks), "num_attention_heads": vit.blocks[0].attn.num_heads,
        "intermediate_size": vit.blocks[0].mlp.fc1.out_features, "hidden_act": act["vision_config"],
        "layer_norm_eps": vit.norm.eps,
    }  # fmt: skip
    text_config = {
        "vocab_size": text.vocab, "max_position_embeddings": text.context, "hidden_size": text.width,
        "num_hidden_layers": text.layers, "num_attention_heads": text.heads, "intermediate_size": 4 * text.width,
        "hidden_act": act["text_config"], "layer_norm_eps": text.norm_eps,
    }  # fmt: skip
    if siglip:
        text_config |= {"projection_size": trunk.embed_dim, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}
        return {
            "model_type": "siglip", "architectures": ["SiglipModel"],
            "text_config": text_config, "vision_config": vision_config,
        }  # fmt: skip
    # pooled at the end-of-text token, whatever pads behind it
    text_config |= {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    return {
        "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": trunk.embed_dim,
        "text_config": text_config | {"projection_dim": trunk.embed_dim},
        "vision_config": vision_config | {"projection_dim": trunk.embed_dim},
    }  # fmt: skip
