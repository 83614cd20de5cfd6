"""Our own checkpoints into a trunk."""

from __future__ import annotations

from typing import Literal

import torch

from pretrain.checkpoint import Checkpoint
from pretrain.errors import UserError
from pretrain.models.trunk import Trunk
from pretrain.weights.naming import differences


def load_trunk(trunk: Trunk, checkpoint: Checkpoint, of: Literal["model", "teacher"] = "model") -> None:
    """Copy the checkpoint's model, or the momentum teacher that followed it, into `trunk`.

    Raises:
        UserError: names or shapes differ; all are shown, nothing was copied.
    """
    stored = {n.removeprefix(f"{of}."): n for n in checkpoint.names() if n.startswith(f"{of}.")}
    if not stored:
        raise UserError(f"{checkpoint.path} holds no {of}: its objectives have none")
    own = trunk.state_dict()
    differ = differences(
        {n: tuple(t.shape) for n, t in own.items()}, {n: checkpoint.shape(full) for n, full in stored.items()}
    )
    if differ:
        raise UserError(f"{checkpoint.path} is of another model than {trunk.image.name} as built here:\n{differ}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(checkpoint.read(stored[name]))
