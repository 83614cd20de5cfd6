"""timm's weights for the image tower, in and out: the backbone as timm names it, its classifier left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pretrain.models.trunk import Trunk
from pretrain.weights.files import read_weights
from pretrain.weights.naming import Rule, copied, load

BACKBONE = "image.backbone."


def load_timm(trunk: Trunk, weights: Mapping[str, Tensor] | str | Path) -> None:
    """Copy a timm state dict, or a file of it, into the image tower; the projection stays as it is.

    A classifier in the file is left out, unless it is CLIP's attention pool, which is part of the tower.

    Raises:
        UserError: the weights are of another model: the differing names and shapes are listed.
    """
    where = str(weights) if isinstance(weights, str | Path) else "this state dict"
    named = read_weights(weights) if isinstance(weights, str | Path) else dict(weights)
    names = backbone_names(trunk)
    wanted = {theirs for theirs, _ in names.values()}
    classifiers = _classifiers(trunk)
    kept = {n: t for n, t in named.items() if n in wanted or not n.startswith(classifiers)}
    load(trunk, kept, names, where)


def to_timm(trunk: Trunk) -> dict[str, Tensor]:
    """The image backbone as `timm.create_model(name, num_classes=0)` loads it; CLIP's ResNets with
    `num_classes=embed_dim`. Tensors are copies on the CPU."""
    own = trunk.state_dict()
    return copied({theirs: own[ours] for ours, (theirs, _) in backbone_names(trunk).items()})


def backbone_names(trunk: Trunk, prefix: str = "") -> dict[str, tuple[str, Rule]]:
    """timm's names of the image backbone, `prefix` before each."""
    own = [name for name in trunk.state_dict() if name.startswith(BACKBONE)]
    return {name: (theirs := prefix + name.removeprefix(BACKBONE), Rule(name, theirs)) for name in own}


def _classifiers(trunk: Trunk) -> tuple[str, ...]:
    named = trunk.image.backbone.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))
