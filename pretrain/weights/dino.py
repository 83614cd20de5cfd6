"""DINO's and DINOv2's weights (facebookresearch's names) as timm has them.

DINO's backbones are timm's already. DINOv2's have a mask token, which only its training reads, registers under
another name, and gated MLPs named after their matrices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

RENAMED = (
    (r"^backbone\.", ""),
    (r"^blocks\.\d+\.(?=\d+\.)", "blocks."),  # trained in chunks of blocks, which are numbered through
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^register_tokens$", "reg_token"),
)


def as_timm(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under timm's names; those of heads keep theirs."""
    found = {}
    for name, tensor in named.items():
        for pattern, ours in RENAMED:
            name = re.sub(pattern, ours, name)
        found[name] = tensor
    if "reg_token" in found:  # timm's models with registers add positions to patches alone
        position = found["pos_embed"]
        found |= {"cls_token": found["cls_token"] + position[:, :1], "pos_embed": position[:, 1:]}
    return found
