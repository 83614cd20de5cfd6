"""Where exports go: what each consumer's folder holds, and the code that embeds with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pretrain.errors import UserError
from pretrain.models.image import timm_kwargs
from pretrain.models.text import QuickGELU
from pretrain.recipe import ModelRecipe, TextRecipe
from pretrain.weights import snippets
from pretrain.weights.hf import to_hf
from pretrain.weights.native import FILE, save_export
from pretrain.weights.onnx import write_onnx
from pretrain.weights.open_clip import INITIAL_LOGIT_SCALE, to_open_clip
from pretrain.weights.source import Source
from pretrain.weights.timm import to_timm
from pretrain.weights.tokenizer import write_tokenizer


@dataclass(frozen=True)
class Target:
    """One consumer."""

    library: str
    """As the Hugging Face Hub calls it."""
    packages: tuple[str, ...]
    """What its code needs installed."""
    holds: str
    """One sentence on what is in the folder."""
    write: Callable[[Source, Path], None]
    """Everything but the card, into an empty folder; UserError for what the consumer cannot hold."""
    pieces: Callable[[ModelRecipe], list[str]]
    """Its code."""
    resizes: bool = True
    """Its own preprocessing knows `model.eval_resize`."""
    backbone: bool = False
    """Only the image backbone goes: the features are those before the projection."""

    def code(self, model: ModelRecipe) -> str:
        """What embeds with an export of `model` in `folder`; see `pretrain.weights.snippets`."""
        return snippets.whole(self.pieces(model), model)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


# ---- open_clip


def _write_open_clip(source: Source, folder: Path) -> None:
    scale, bias = source.temperature.get("logit_scale", INITIAL_LOGIT_SCALE), source.temperature.get("logit_bias")
    tensors, model_cfg = to_open_clip(source.trunk, scale, bias), open_clip_config(source)
    model_cfg["custom_text"] = any(name.startswith("text.") for name in tensors)  # its class for SigLIP
    if bias is not None:
        model_cfg["init_logit_bias"] = bias
    save_file(tensors, folder / "open_clip_model.safetensors")
    if source.model.text and source.model.text.tokenizer:  # CLIP's own is in open_clip
        write_tokenizer(source.model, folder)
    preprocess = {
        "mean": source.model.mean,
        "std": source.model.std,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    _json(folder / "open_clip_config.json", {"model_cfg": model_cfg, "preprocess_cfg": preprocess})


def open_clip_config(source: Source) -> dict[str, Any]:
    """open_clip's `model_cfg` of a trunk that `to_open_clip` takes.

    Raises:
        UserError: an option that open_clip's classes have not.
    """
    text = source.model.text or TextRecipe()
    if text.pool == "max":
        raise UserError("open_clip's text tower knows no model.text.pool: max")
    vision, quick = _vision(source)
    assert source.trunk.text is not None
    act = source.trunk.text.blocks[0].act
    if quick is not None and quick != isinstance(act, QuickGELU):
        raise UserError("open_clip has one activation for both towers; here model.text.activation is another")
    text_cfg = {
        "context_length": text.context, "vocab_size": text.vocab, "width": text.width, "heads": text.heads,
        "layers": text.layers, "no_causal_mask": not text.causal, "proj_bias": text.projection_bias,
        "pool_type": "argmax" if text.pool == "eot" else text.pool, "norm_kwargs": {"eps": text.norm_eps},
        "act_kwargs": {"approximate": "tanh"} if getattr(act, "approximate", "none") == "tanh" else None,
    }  # fmt: skip
    return {
        "embed_dim": source.trunk.embed_dim, "quick_gelu": isinstance(act, QuickGELU),
        "vision_cfg": vision, "text_cfg": text_cfg,
    }  # fmt: skip


def _vision(source: Source) -> tuple[dict[str, Any], bool | None]:
    """`vision_cfg`, and whether that tower has quick_gelu; None for a tower that has an activation of its own."""
    model, tower, backbone = source.model, source.trunk.image, source.trunk.image.backbone
    size = {"image_size": model.image_size}
    if "_clip" in model.image and model.image.startswith("vit_"):
        block = backbone.blocks[0]
        return size | {
            "layers": len(backbone.blocks), "width": backbone.embed_dim,
            "patch_size": backbone.patch_embed.patch_size[0], "head_width": backbone.embed_dim // block.attn.num_heads,
            "mlp_ratio": block.mlp.fc1.out_features / backbone.embed_dim, "norm_kwargs": {"eps": block.norm1.eps},
        }, "quick" in type(block.mlp.act).__name__.lower()  # fmt: skip
    if tower.projector is not None and tower.projection is None:  # CLIP's ResNets
        width = backbone.stem.conv3.conv.out_channels
        heads = backbone.head.num_heads
        layers = [len(stage) for stage in backbone.stages]
        return size | {"layers": layers, "width": width, "head_width": width * 32 // heads}, None
    if shape := [key for key in model.image_kwargs if not key.endswith(("drop_rate", "drop_path_rate"))]:
        raise UserError(
            f"open_clip makes timm's {model.image} without model.image_kwargs, here {', '.join(shape)}; "
            "`--to timm` and `--to onnx` hold this tower"
        )
    made_for = backbone.pretrained_cfg["input_size"][-1]
    if backbone.pretrained_cfg.get("fixed_input_size") and model.image_size != made_for:
        raise UserError(
            f"open_clip makes timm's {model.image} for {made_for} pixels alone, here model.image_size is "
            f"{model.image_size}; `--to timm`, `--to onnx` and `--to safetensors` hold this tower"
        )
    if tower.projection is not None:
        return size | {"timm_model_name": model.image, "timm_pool": "", "timm_proj": "linear"}, None
    pool = getattr(backbone, "global_pool", "avg")  # without a projection open_clip takes timm's off unless told
    pool = pool if isinstance(pool, str) else pool.pool_type
    return size | {"timm_model_name": model.image, "timm_pool": pool, "timm_proj": "none"}, None


# ---- timm


def _write_timm(source: Source, folder: Path) -> None:
    model, backbone = source.model, source.trunk.image.backbone
    if model.leff:
        raise UserError(f"timm's {model.image} has no blocks as model.leff {model.leff} makes them")
    resize = model.eval_resize or model.image_size
    pretrained_cfg = {
        "input_size": (3, model.image_size, model.image_size), "mean": model.mean, "std": model.std,
        "interpolation": "bicubic", "crop_mode": "center",
        "crop_pct": model.image_size / (resize + 0.5) if resize > model.image_size else 1.0,  # timm rounds down
        **{k: v for k, v in backbone.pretrained_cfg.items() if k in ("first_conv", "classifier", "fixed_input_size")},
    }  # fmt: skip
    config = {
        "architecture": model.image, "num_classes": backbone.num_classes, "num_features": backbone.num_features,
        "model_args": timm_kwargs(model), "pretrained_cfg": pretrained_cfg,
    }  # fmt: skip
    save_file(to_timm(source.trunk), folder / FILE)
    _json(folder / "config.json", config)


# ---- transformers


def _write_hf(source: Source, folder: Path) -> None:
    scale = source.temperature.get("logit_scale", INITIAL_LOGIT_SCALE)
    tensors, config = to_hf(source.trunk, source.model, scale, source.temperature.get("logit_bias"))
    save_file(tensors, folder / FILE, {"format": "pt"})
    _json(folder / "config.json", config)
    size = source.model.image_size
    processor = {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": source.model.eval_resize or size}, "resample": 3,  # bicubic
        "do_center_crop": True, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": source.model.mean, "image_std": source.model.std,
    }  # fmt: skip
    _json(folder / "preprocessor_config.json", processor)
    write_tokenizer(source.model, folder)


# ---- ONNX


def _write_onnx(source: Source, folder: Path) -> None:
    write_onnx(source.trunk, source.model.image_size, folder)
    write_tokenizer(source.model, folder)


# ---- polyview itself


def _write_own(source: Source, folder: Path) -> None:
    if source.model.text and source.model.text.tokenizer:
        write_tokenizer(source.model, folder)
    facts = {"fingerprint": source.encoder.fingerprint, "run": source.run, **source.temperature}
    save_export(source.trunk.state_dict(), source.model, folder, **facts)


TARGETS = {
    "open_clip": Target(
        "open_clip", ("open_clip_torch",), "Both towers and the temperature, as open_clip's CLIP class has them.",
        _write_open_clip, snippets.open_clip, resizes=False,
    ),
    "timm": Target(
        "timm", ("timm",), "The image backbone alone, before any projection: timm has no text towers.",
        _write_timm, snippets.timm, backbone=True,
    ),
    "hf": Target(
        "transformers", ("transformers",), "Both towers and the temperature, as transformers has them.",
        _write_hf, snippets.hf,
    ),
    "safetensors": Target(
        "polyview", ("polyview",), "The weights under polyview's own names, with the recipe's model section.",
        _write_own, snippets.own,
    ),
    "onnx": Target(
        "onnx", ("onnxruntime", "tokenizers"), "The towers as graphs: uint8 pixels or token ids in, unit rows out.",
        _write_onnx, snippets.onnx, resizes=False,
    ),
}  # fmt: skip
