"""Our own checkpoints into a trunk."""

from __future__ import annotations

import torch

from pretrain.checkpoint import Checkpoint
from pretrain.errors import UserError
from pretrain.models.trunk import Trunk
from pretrain.weights.naming import differences
from pretrain.weights.which import Which

ABSENT = {"model": "no model", "teacher": "no teacher: its objectives have none", "ema": "no ema: its recipe has none"}


def load_trunk(trunk: Trunk, checkpoint: Checkpoint, of: Which = "model") -> None:
    """Copy the checkpoint's model, the momentum teacher that followed it, or its running average, into `trunk`.

    Raises:
        UserError: there is none, or names or shapes differ; all are shown, nothing was copied.
    """
    stored = {n.removeprefix(f"{of}."): n for n in checkpoint.names() if n.startswith(f"{of}.")}
    if not stored:
        raise UserError(f"{checkpoint.path} holds {ABSENT[of]}")
    own = trunk.state_dict()
    differ = differences(
        {n: tuple(t.shape) for n, t in own.items()}, {n: checkpoint.shape(full) for n, full in stored.items()}
    )
    if differ:
        raise UserError(f"{checkpoint.path} is of another model than {trunk.image.name} as built here:\n{differ}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(checkpoint.read(stored[name]))
