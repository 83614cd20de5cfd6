"""First weights of a new run, from files of others or a run of ours: whatever of them fits the recipe's trunk.

Unlike the loaders of one family each, which want every tensor, this takes a part (an image tower where there is no
text tower in the file), brings position embeddings to another size, and says what it did. What has the right name but
another shape is never passed over in silence: then nothing is copied at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint import find_checkpoint
from pretrain.errors import UserError
from pretrain.models.trunk import Trunk
from pretrain.objectives.joint import Joint
from pretrain.recipe import InitRecipe
from pretrain.weights import dino, hf, open_clip
from pretrain.weights.files import IN_A_FOLDER, read_weights
from pretrain.weights.naming import TEMPERATURE, Names, Rule, differences
from pretrain.weights.positions import fitted
from pretrain.weights.timm import backbone_names
from pretrain.weights.torchscript import is_torchscript

TOWERS = {"image.backbone.": "model.image", "text.": "model.text"}


@dataclass
class Report:
    """What `load_init` did, by name."""

    where: str
    loaded: list[str]
    """Our names."""
    resized: dict[str, str]
    """Those of them that were brought to another size: how."""
    missing: list[str]
    """Our names that the file has nothing for: they keep their first values."""
    unused: list[str]
    """The file's names that there is no place for here."""
    temperature: list[str] = field(default_factory=list)
    """The objectives' parameters that took the file's."""
    warnings: list[str] = field(default_factory=list)
    """What looks like a mistake, and what to do about it."""

    def __str__(self) -> str:
        rows = [
            ("loaded", [f"{len(self.loaded)} tensors", *_shown(self.temperature)]),
            ("resized", [f"{name} ({how})" for name, how in self.resized.items()]),
            ("at their first values", _shown(self.missing)),
            ("of no use here", _shown(self.unused)),
        ]
        lines = [f"  {what:<22}{', '.join(names)}" for what, names in rows if names]
        return "\n".join([f"first weights from {self.where}", *lines])


def load_init(trunk: Trunk, joint: Joint, init: InitRecipe) -> Report:
    """Copy what fits of the recipe's first weights into `trunk`, and their temperature into the objectives.

    Raises:
        UserError: no such weights; nothing of a tower fits, or shapes differ that are no position embedding's (all are
            listed); nothing was copied then.
    """
    foreign, names = _read(trunk, init)
    report = fit(trunk, foreign, names, str(init.weights))
    temperature = {n.rsplit(".", 1)[-1]: t for n, t in foreign.items() if n.rsplit(".", 1)[-1] in TEMPERATURE}
    with torch.no_grad():
        for name, parameter in joint.members.named_parameters():
            if (value := temperature.get(name.rsplit(".", 1)[-1])) is not None:
                parameter.copy_(value.reshape(parameter.shape))
                report.temperature.append(name)
    report.warnings += _other_activations(trunk, init.weights)
    return report


def _other_activations(trunk: Trunk, weights: Path) -> list[str]:
    """Where the weights say what they were trained with, and the recipe says otherwise; most files do not say it."""
    wanted = hf.told_activations(weights) if weights.is_dir() else {}
    if weights.is_file() and is_torchscript(weights):  # nobody but OpenAI published such
        wanted = {"vision_config": "quick_gelu", "text_config": "quick_gelu"}
    keys = {"vision_config": "model.activation", "text_config": "model.text.activation"}
    return [
        f"{weights} was trained with {wanted[tower]}, the recipe's tower has {act}: set {keys[tower]}"
        for tower, act in hf.activations(trunk).items()
        if wanted.get(tower, act) != act
    ]


def _read(trunk: Trunk, init: InitRecipe) -> tuple[Mapping[str, Tensor], Names]:
    """The tensors by their names, and which of ours they are for."""
    kind: str = init.format
    if kind in ("auto", "native") and _is_run(init.weights):
        return _of_a_run(init), _as_they_are(trunk)
    named = read_weights(init.weights, init.of)
    if kind == "auto":
        kind = _told(named)
    if kind == "native":
        return named, _as_they_are(trunk)
    if kind == "open_clip":
        timm_tower = any(name.startswith("visual.trunk.") for name in named)
        return open_clip.flat(named), open_clip.names(trunk, timm_tower)
    if kind == "hf":
        return hf.joined(named), hf.names(trunk)
    return dino.as_timm(named), backbone_names(trunk)


def _is_run(path: Path) -> bool:
    return path.is_dir() and not any((path / name).is_file() for name in IN_A_FOLDER)


def _told(named: Mapping[str, Tensor]) -> str:
    """The format by the names: towers of several have them under a prefix, a tower alone is timm's, or as timm's."""
    if any(name.startswith("image.backbone.") for name in named):
        return "native"
    if any(name.startswith("visual.") for name in named):
        return "open_clip"
    return "hf" if any(name.startswith(("vision_model.", "text_model.")) for name in named) else "timm"


def _as_they_are(trunk: Trunk) -> Names:
    return {name: (name, Rule(name, name)) for name in trunk.state_dict()}


def _of_a_run(init: InitRecipe) -> dict[str, Tensor]:
    checkpoint = find_checkpoint(init.weights)
    stored = {n.removeprefix(f"{init.of}."): n for n in checkpoint.names() if n.startswith(f"{init.of}.")}
    if not stored:
        raise UserError(f"init.of: {checkpoint.path} holds no {init.of}")
    beside = {n: n for n in checkpoint.names() if n.startswith("objective.") and n.endswith(TEMPERATURE)}
    return {name: checkpoint.read(n) for name, n in (stored | beside).items()}


@torch.no_grad()
def fit(trunk: Trunk, foreign: Mapping[str, Tensor], names: Names, where: str) -> Report:
    """Copy what there is of `names` in `foreign`; see `load_init`."""
    own = trunk.state_dict()
    theirs = {ours: rule.to_ours(foreign[name]) for ours, (name, rule) in names.items() if name in foreign}
    _refuse_another_model(trunk, theirs, foreign, names, where)
    found = {name: fitted(trunk, name, tensor) for name, tensor in theirs.items()}
    differ = differences({n: tuple(own[n].shape) for n in found}, {n: tuple(t.shape) for n, t in found.items()})
    if differ:
        raise UserError(f"{where} does not fit this model:\n{differ}\nset `model` as it was when they were made")
    for name, tensor in found.items():
        own[name].copy_(tensor)
    used = {names[ours][0] for ours in found}
    missing = [n for n in own if n not in found and not n.endswith("num_batches_tracked")]
    part = [n for n in missing if any(n.startswith(tower) and _any(found, tower) for tower in TOWERS)]
    return Report(
        where,
        loaded=list(found),
        resized={n: f"{t.shape[-2]} to {found[n].shape[-2]}" for n, t in theirs.items() if t.shape != found[n].shape},
        missing=missing,
        unused=[n for n in foreign if n not in used and n.rsplit(".", 1)[-1] not in TEMPERATURE],
        warnings=[f"{where} fills a tower in part: {len(part)} tensors of it start afresh"] if part else [],
    )


def _refuse_another_model(
    trunk: Trunk, theirs: Mapping[str, Tensor], foreign: Mapping[str, Tensor], names: Names, where: str
) -> None:
    """Every tower that the file brings must have some of its tensors here; an image tower is always wanted."""
    known = {tower: {n for ours, (n, _) in names.items() if ours.startswith(tower)} for tower in TOWERS}
    for tower, key in TOWERS.items():
        heads = {name.split(".")[0] for name in known[tower]}
        brought = tower.startswith("image") or any(name.split(".")[0] in heads for name in foreign)
        if brought and not _any(theirs, tower):
            there = ", ".join(list(foreign)[:3])
            raise UserError(
                f"{where} has nothing for {key} as the recipe says: it holds {there}, …, and wanted are "
                f"{', '.join(sorted(known[tower])[:3])}, …; set `model` as it was when they were made, or init.format"
            )


def _any(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _shown(names: list[str], most: int = 6) -> list[str]:
    return [*names[:most], *([f"and {len(names) - most} more"] if len(names) > most else [])]
