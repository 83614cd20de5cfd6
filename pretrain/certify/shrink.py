"""A recipe with towers and heads small enough for a float64 step in a moment, of the same kind and options.

What draws random numbers by rank (dropout, dropped paths and patches) is left out: no two worlds draw alike.
"""

from __future__ import annotations

from typing import Any

from pretrain.objectives import find
from pretrain.recipe import ComputeRecipe, ModelRecipe, Recipe

ROWS = 24
"""Global batch: 2 rows a micro-batch at world 3 and accumulation 4."""
SAMPLES = 240
"""An epoch, as far as objectives ask."""
STEPS = 100
IMAGE, CROP = 32, 16  # pixels: the trunk's image, and crops smaller than it
PATCH = 8
BEGUN = {"queue": 2 * ROWS, "freeze_steps": 0, "queue_from_step": 0, "teacher_temperature_warmup_steps": 0}
"""Largest value of an objective's option of this name, so that all of it is at work in the first steps."""
SIZES = {
    "prototypes": 12, "hidden": 16, "dim": 8, "bottleneck": 8, "gate_width": 8, "gate_hidden": 16, "classes": 4,
    "pseudo_labels": 4,
}  # fmt: skip
"""The same, so that heads are small."""
CROPS_OF_A_KIND = 2


def steady(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """`recipe` in fp32, with a batch of ROWS, without random draws and with all that begins later begun; and what was
    changed, line by line.

    Raises:
        UserError: an objective that is not known.
    """
    model, kept = recipe.model, {k: v for k, v in recipe.model.image_kwargs.items() if "drop" not in k}
    text = model.text and model.text.model_copy(update={"dropout": 0.0})
    compute = ComputeRecipe(
        checkpoint_blocks=recipe.compute.checkpoint_blocks, channels_last=recipe.compute.channels_last
    )
    changed = recipe.model_copy(
        update={
            "model": model.model_copy(update={"image_kwargs": kept, "text": text, "patch_dropout": 0.0}),
            "objectives": {name: _capped(name, _begun(options), BEGUN) for name, options in recipe.objectives.items()},
            "global_batch": ROWS, "accumulation": 1, "local_batch": None, "steps": STEPS, "epochs": None,
            "world": None, "precision": "fp32", "compute": compute, "init": None,
        }
    )  # fmt: skip
    return changed, [
        f"global batch {ROWS}, fp32, no dropout of any kind, nothing frozen at first, weights of seed {recipe.seed}"
    ]


def shrink(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """A small recipe of the same kind, and how it was made so, line by line.

    Raises:
        UserError: as `steady`.
    """
    small, notes = steady(recipe)
    model, told = _towers(small.model)
    objectives = {name: _smaller(name, options) for name, options in small.objectives.items()}
    return small.model_copy(update={"model": model, "objectives": objectives}), notes + told


# ---- towers


def _towers(model: ModelRecipe) -> tuple[ModelRecipe, list[str]]:
    size = min(model.image_size, IMAGE if _is_vit(model.image) else 2 * IMAGE)  # a ResNet halves it five times
    changes: dict[str, Any] = {"image_size": size, "eval_resize": None, "image_kwargs": _image_kwargs(model)}
    notes = [f"image: {model.image} {changes['image_kwargs']}, {size} pixels"]
    if changes["image_kwargs"].get("act_layer") != model.image_kwargs.get("act_layer"):
        notes.append("gelu in place of relu: at its kink fp32's rounding alone turns a gradient on or off")
    changes["embed_dim"] = model.embed_dim and 16
    if model.text:
        text = {"width": 32, "layers": 2, "heads": 2, "context": min(model.text.context, 12), "vocab": 128}
        changes["text"] = model.text.model_copy(update=text)
        notes.append(f"text: {text}")
    if model.regions:
        stored = model.regions.stored_dim and 16
        changes["regions"] = model.regions.model_copy(update={"blocks": 1, "most": 3, "stored_dim": stored})
    unlocked = {k: min(getattr(model.lock, k), 1) for k in ("image_unlocked", "text_unlocked")}
    return model.model_copy(
        update=changes | {"leff": min(model.leff, 1), "lock": model.lock.model_copy(update=unlocked)}
    ), notes


def _is_vit(name: str) -> bool:
    return name.startswith(("vit_", "deit"))


def _image_kwargs(model: ModelRecipe) -> dict[str, Any]:
    """What makes timm's tower of this name small; other families are left at their size."""
    name, given = model.image, model.image_kwargs
    if "resnet" in name or name.startswith("resnext"):
        given = given | {"act_layer": "gelu"}  # at ReLU's kink fp32's rounding alone turns a gradient on or off
    if name.startswith("test_"):
        return given
    if _is_vit(name):
        return given | {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": PATCH}
    if name.startswith("convnext"):
        return given | {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 32]}
    if name.startswith("resnet") and name.endswith("_clip"):
        return given | {"width_factor": 0.125}
    if name.startswith(("resnet", "wide_resnet", "resnext")):
        return given | {"layers": [1, 1, 1, 1], "channels": [32, 32, 32, 32]}
    return given


# ---- objectives


def _begun(options: float | dict[str, Any]) -> dict[str, Any]:
    """A weight that is on its way from 0 would hide its objective: it is taken where it is greatest."""
    if not isinstance(options, dict):
        return {"weight": options}
    weight = options.get("weight", 1.0)
    return options | {"weight": max(weight["start"], weight["end"]) if isinstance(weight, dict) else weight}


def _capped(name: str, options: dict[str, Any], most: dict[str, int]) -> dict[str, Any]:
    """`options` with what it, or the objective by default, has of `most` brought down to it."""
    fields = find(name).Options.model_fields
    own = {key: options.get(key, fields[key].default) for key in most.keys() & fields.keys()}
    return options | {key: min(value, most[key]) for key, value in own.items() if value is not None}


def _smaller(name: str, options: Any) -> dict[str, Any]:
    fields, small = find(name).Options.model_fields, _capped(name, options, SIZES)
    if "crops" in fields:
        small["crops"] = _crops(small.get("crops", fields["crops"].default))
    return small | {"size": None} if "size" in fields else small


def _crops(kinds: Any) -> list[list[Any]]:
    """The first kind as large as the trunk's image, the others small."""
    return [[min(count, CROPS_OF_A_KIND), CROP if i else None, scale] for i, (count, _, scale) in enumerate(kinds)]
