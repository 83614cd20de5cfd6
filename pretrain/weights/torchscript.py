"""The tensors of a TorchScript archive, with nothing in it run: OpenAI published CLIP's weights as such.

`torch.jit.load` makes the modules by the archive's own code, and `torch.load(weights_only=True)` refuses these files.
But the tensors lie in the zip as plain bytes, and the pickle beside them says only where. It is read here by an
unpickler that knows three things: a tensor's place, a list of numbers, and a module, which becomes an empty shell with
attributes. Any other name in it is an error.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORAGES = {
    f"{kind}Storage": dtype
    for kind, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}  # fmt: skip


def is_torchscript(path: Path) -> bool:
    """Whether the file is such an archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers, named as in the module's state dict."""
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
        with archive.open(f"{root}data.pkl") as file:
            return _tensors(_Unpickler(file, archive, f"{root}data/").load())


class _Shell:
    """A module of the archive: its attributes, and no code."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder
        self._storages: dict[str, Tensor] = {}  # shared ones are read once

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Shell
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known = {
            "torch._utils._rebuild_tensor_v2": _tensor,
            "collections.OrderedDict": OrderedDict,
            **{f"torch.jit._pickle.build_{kind}list": list for kind in ("int", "double", "bool", "tensor")},
        }
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"{module}.{name} has no place among weights")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        if key not in self._storages:
            data = bytearray(self._archive.read(self._folder + key)) if count else bytearray()
            self._storages[key] = torch.frombuffer(data, dtype=dtype, count=count) if count else torch.empty(0)
        return self._storages[key]


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _tensors(module: _Shell, prefix: str = "") -> dict[str, Tensor]:
    found = {}
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, _Shell):
            found |= _tensors(value, f"{prefix}{name}.")
    return found
