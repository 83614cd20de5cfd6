"""The backends by name: for code, the recipe and commands. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal, get_args

BackendName = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
