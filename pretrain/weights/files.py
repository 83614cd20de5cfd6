"""Reading weight files of others: safetensors, or torch archives without running what is in them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.errors import UserError
from pretrain.weights.torchscript import is_torchscript, read_torchscript

WRAPPERS = ("state_dict", "model", "model_state_dict")
BRANCHES = {"model": "student", "teacher": "teacher"}
"""What DINO's checkpoints call the weights that a recipe's `of` names."""
IN_A_FOLDER = (
    "model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors", "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)  # fmt: skip


def read_weights(path: str | Path, of: str = "model") -> dict[str, Tensor]:
    """The named tensors of a `.safetensors`, `.pt`, `.pth` or `.bin` file, or of a Hugging Face model folder.

    What trainers wrap around them is taken off: `{"state_dict": …}`, and `module.` before every name. `of` chooses
    where a checkpoint has a student and a teacher. TorchScript archives, OpenAI's, are read without being run.

    Raises:
        UserError: no such file, no weight file, one that would need pickled code, or without what `of` says.
    """
    path = _file(Path(path))
    try:
        content = _read(path)
    except Exception as error:  # a restricted unpickler fails with whatever a foreign byte leads it to
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if isinstance(error, UnpicklingError) and "weights_only" in str(error):  # torch advises to run what is in it
            why = "it holds no named tensors, or needs pickled code, which is never run"
        raise UserError(f"{path} cannot be read as weights: {why}") from error
    return _unwrap(content, path, of)


def _file(path: Path) -> Path:
    if path.is_dir():
        found = next((path / name for name in IN_A_FOLDER if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{path} is no folder of weights: it holds none of {', '.join(IN_A_FOLDER)}")
        return found
    if not path.is_file():
        raise UserError(f"{path}: no such weight file")
    return path


def _read(path: Path) -> Any:
    if path.suffix == ".json":  # several files, and an index of which tensor is where
        files = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return {name: t for file in files for name, t in load_file(path.parent / file).items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    if is_torchscript(path):
        return read_torchscript(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # what DINO keeps its arguments in: a bag of values
        return torch.load(path, map_location="cpu", weights_only=True)


def _unwrap(content: Any, path: Path, of: str) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and (branches := content.keys() & set(BRANCHES.values())):
        if BRANCHES.get(of) not in branches:
            has = " and ".join(sorted(ours for ours, theirs in BRANCHES.items() if theirs in branches))
            raise UserError(f"{path} has no weights of the {of}; init.of can be {has}")
        content = content[BRANCHES[of]]
    wrapper = next((w for w in WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(w), Mapping)), None)
    named = content[wrapper] if wrapper else content
    if not isinstance(named, Mapping) or not named or not all(isinstance(t, Tensor) for t in named.values()):
        raise UserError(f"{path} holds no named tensors; expected a state dict, or one under {', '.join(WRAPPERS)}")
    if all(name.startswith("module.") for name in named):
        named = {name.removeprefix("module."): t for name, t in named.items()}
    return dict(named)
