"""How a checkpoint lies in its store: names of folders and files, and the safetensors header.

    checkpoints/step_00000100/
        data-<attempt>-<rank>-<piece>.safetensors   flat ranges, keys "<tensor>@<offset>", at most ~4 GiB each
        part-<attempt>-<rank>.json                  what one rank wrote; gone after the commit
        manifest.json                               all ranges of all ranks; its presence is the commit

The safetensors format is written and read here by hand: the header is 8 bytes of length and a JSON object,
and writing it ourselves lets the bytes go from the host buffer to the file without another copy, and lets a
reader fetch any sub-range with one request. Any safetensors library reads the files too.
"""

from __future__ import annotations

import json
import re
import struct
from typing import NamedTuple

import torch

from pretrain.checkpoint.errors import CheckpointError, unreadable
from pretrain.checkpoint.store import Store, Where, open_store
from pretrain.patience import patiently

MANIFEST = "manifest.json"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_STEP = re.compile(r"step_(\d+)")
_ATTEMPT = re.compile(r"[A-Za-z0-9]+")
_OWNED = re.compile(r"(?:data|part|manifest)-([A-Za-z0-9]+)[-.]")


def step_dir(root: Where, step: int) -> Store:
    return open_store(root) / f"step_{step:08d}"


def step_dirs(root: Where) -> dict[int, Store]:
    """The step folders under `root`, whole or not, newest first. Raises CheckpointError where it cannot be listed."""
    store = open_store(root)
    try:
        matches = [match for name in patiently(store.folders) if (match := _STEP.fullmatch(name))]
    except OSError as e:
        raise unreadable(f"{store}: the list of its checkpoints", e) from e
    return {int(m[1]): store / m[0] for m in sorted(matches, key=lambda m: int(m[1]), reverse=True)}


def data_name(attempt: str, rank: int, piece: int) -> str:
    return f"data-{attempt}-{rank:05d}-{piece:03d}.safetensors"


def part_name(attempt: str, rank: int) -> str:
    return f"part-{attempt}-{rank:05d}.json"


def manifest_draft(attempt: str) -> str:
    """The name a manifest is written under before it is renamed: two attempts never share it."""
    return f"manifest-{attempt}.json"


def attempt_of(file_name: str) -> str | None:
    """Which attempt wrote a file of a step folder; None for the manifest and for what is not ours."""
    match = _OWNED.match(file_name)
    return match[1] if match else None


def check_attempt(attempt: str) -> str:
    if not _ATTEMPT.fullmatch(attempt):
        raise CheckpointError(f"attempt {attempt!r}: use letters and digits only (it becomes part of file names)")
    return attempt


def range_key(name: str, offset: int) -> str:
    return f"{name}@{offset}"


class Placed(NamedTuple):
    """Where a range lies in its data file: bytes [start, stop) of the file."""

    dtype: str
    length: int
    start: int
    stop: int


def encode_header(ranges: dict[str, tuple[str, int, int, int]], labels: dict[str, str]) -> bytes:
    """The head of a safetensors file; `ranges`: key -> (dtype, elements, first data byte, last + 1)."""
    table: dict[str, object] = {"__metadata__": labels}
    for key, (dtype, length, start, stop) in ranges.items():
        table[key] = {"dtype": dtype, "shape": [length], "data_offsets": [start, stop]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, as the format asks
    return struct.pack("<Q", len(text)) + text


def read_header(folder: Store, file: str, size: int) -> tuple[dict[str, Placed], dict[str, str]]:
    """The ranges and labels of a data file of `size` bytes. Raises CheckpointError when the head is not readable."""
    try:
        (length,) = struct.unpack("<Q", patiently(folder.read, file, 8))
        if length > size - 8:
            raise ValueError(f"its header claims {length} bytes")
        table = json.loads(patiently(folder.read, file, 8 + length)[8:])
        labels = table.pop("__metadata__", {})
        base = 8 + length
        return {key: _placed(entry, base) for key, entry in table.items()}, labels
    except OSError as e:
        raise unreadable(f"{folder / file}: its header", e) from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as e:
        raise CheckpointError(f"{folder / file}: not a readable safetensors file ({e}); use another checkpoint") from e


def _placed(entry: dict, base: int) -> Placed:
    start, stop = entry["data_offsets"]
    (length,) = entry["shape"]
    return Placed(entry["dtype"], length, base + start, base + stop)
