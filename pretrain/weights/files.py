"""Reading weight files of others: safetensors, or torch archives without running what is in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.errors import UserError

WRAPPERS = ("state_dict", "model", "model_state_dict")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a `.safetensors`, `.pt`, `.pth` or `.bin` file.

    What trainers wrap around them is taken off: `{"state_dict": …}`, and `module.` before every name.

    Raises:
        UserError: no such file, no weight file, a TorchScript archive, or one that would need pickled code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weight file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _read_torch(path)
    except Exception as error:  # torch's restricted unpickler fails with whatever a foreign byte leads it to
        why = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path} cannot be read as weights: {type(error).__name__}: {why}") from error
    return _unwrap(content, path)


def _read_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    wrapper = next((w for w in WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(w), Mapping)), None)
    named = content[wrapper] if wrapper else content
    if not isinstance(named, Mapping) or not named or not all(isinstance(t, Tensor) for t in named.values()):
        raise UserError(f"{path} holds no named tensors; expected a state dict, or one under {', '.join(WRAPPERS)}")
    if all(name.startswith("module.") for name in named):
        named = {name.removeprefix("module."): t for name, t in named.items()}
    return dict(named)
