"""Our own checkpoints and exports into a trunk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.checkpoint import Checkpoint
from pretrain.errors import UserError
from pretrain.models.trunk import Trunk, build_trunk
from pretrain.recipe import ModelRecipe
from pretrain.weights.naming import Rule, differences, load
from pretrain.weights.which import Which

ABSENT = {"model": "no model", "teacher": "no teacher: its objectives have none", "ema": "no ema: its recipe has none"}
FILE = "model.safetensors"
"""Of an export: our own names, and in the header under HEADER what else makes an encoder."""
HEADER = "polyview"


def load_trunk(trunk: Trunk, checkpoint: Checkpoint, of: Which = "model") -> None:
    """Copy the checkpoint's model, the momentum teacher that followed it, or its running average, into `trunk`.

    Raises:
        UserError: there is none, or names or shapes differ; all are shown, nothing was copied.
    """
    own = trunk.state_dict()
    stored = stored_names({n: tuple(t.shape) for n, t in own.items()}, checkpoint, of, trunk.image.name)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(checkpoint.read(stored[name]))


def stored_names(
    shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint, of: Which, tower: str
) -> dict[str, str]:
    """The checkpoint's names for the tensors of a trunk, whose shapes must be these.

    Raises:
        UserError: as `load_trunk`.
    """
    stored = {n.removeprefix(f"{of}."): n for n in checkpoint.names() if n.startswith(f"{of}.")}
    if not stored:
        raise UserError(f"{checkpoint.path} holds {ABSENT[of]}")
    if differ := differences(shapes, {n: checkpoint.shape(full) for n, full in stored.items()}):
        raise UserError(f"{checkpoint.path} is of another model than {tower} as built here:\n{differ}")
    return stored


def save_export(tensors: Mapping[str, Tensor], model: ModelRecipe, folder: Path, **facts: Any) -> None:
    """Write `folder/model.safetensors`: tensors of a trunk, its recipe, and `facts` (JSON) for whoever looks."""
    said = {"model": _beside(model, Path()).model_dump(mode="json"), **facts}
    save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, folder / FILE, {HEADER: json.dumps(said)})


def is_export(folder: str | Path) -> bool:
    """Whether a folder holds one file of weights, as `polyview export` writes it."""
    return (Path(folder) / FILE).is_file()


def open_export(folder: str | Path) -> tuple[Trunk, ModelRecipe]:
    """The trunk that `save_export` wrote, and its recipe.

    Raises:
        UserError: the file is another program's, or its tensors are not those of the model it names.
    """
    file = Path(folder) / FILE
    with safe_open(file, "pt") as opened:
        said = (opened.metadata() or {}).get(HEADER)
    if said is None:
        raise UserError(
            f"{file} does not say which model it holds; `polyview export --to safetensors` writes one that does"
        )
    model = _beside(ModelRecipe.model_validate(json.loads(said)["model"]), Path(folder))
    trunk = build_trunk(model, seed=0)
    load(trunk, load_file(file), {n: (n, Rule(n, n)) for n in trunk.state_dict()}, str(file))
    return trunk, model


def _beside(model: ModelRecipe, folder: Path) -> ModelRecipe:
    """`model`, its tokenizer's file, where it has one, lying in `folder`."""
    if model.text is None or model.text.tokenizer is None:
        return model
    text = model.text.model_copy(update={"tokenizer": folder / model.text.tokenizer.name})
    return model.model_copy(update={"text": text})
