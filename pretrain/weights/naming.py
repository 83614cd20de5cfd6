"""Foreign names for our tensors: one table a family, read in both directions.

A rule pairs our name with theirs; `{}` stands for a block's number or a tensor's last word. The rules are
expanded over the names our trunk really has, so that a missing, unexpected or misshapen tensor is found by
name, all at once, before anything is copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.errors import UserError

Shape = tuple[int, ...]

TEMPERATURE = ("logit_scale", "logit_bias")
"""What models keep beside their towers, and here the objectives have."""


@dataclass(frozen=True)
class Rule:
    """Our name, their name, and what turns one tensor into the other."""

    ours: str
    theirs: str
    layout: str = "same"
    """`same`; `transpose`: their matrix is ours transposed; `lead N`: ours has N more dimensions."""

    def match(self, name: str) -> str | None:
        """Their name for our `name`, or None when the rule is about another tensor."""
        pattern = re.escape(self.ours).replace(re.escape("{}"), r"(\w+)")
        found = re.fullmatch(pattern, name)
        return self.theirs.format(*found.groups()) if found else None

    def to_ours(self, theirs: Tensor) -> Tensor:
        """Their tensor in our layout."""
        if self.layout == "same":
            return theirs
        return theirs.T if self.layout == "transpose" else theirs[(None,) * self._lead]

    def to_theirs(self, ours: Tensor) -> Tensor:
        """Our tensor in their layout."""
        if self.layout == "same":
            return ours
        return ours.T if self.layout == "transpose" else ours[(0,) * self._lead]

    @property
    def _lead(self) -> int:
        return int(self.layout.removeprefix("lead "))


Names = Mapping[str, tuple[str, Rule]]
"""Our names -> (their name, rule)."""


def covered(ours: Iterable[str], rules: Iterable[Rule]) -> dict[str, tuple[str, Rule]]:
    """The names that a rule is about."""
    rules = list(rules)
    hits = {name: next(((t, rule) for rule in rules if (t := rule.match(name)) is not None), None) for name in ours}
    return {name: hit for name, hit in hits.items() if hit is not None}


def table(ours: Iterable[str], rules: Iterable[Rule]) -> dict[str, tuple[str, Rule]]:
    """All of our names. Raises KeyError for one that no rule covers."""
    ours = list(ours)
    found = covered(ours, rules)
    if uncovered := next((name for name in ours if name not in found), None):
        raise KeyError(uncovered)
    return found


def exported(trunk: nn.Module) -> dict[str, Tensor]:
    """The trunk's tensors, less those of its branch for regions, which belongs to training."""
    return {name: t for name, t in trunk.state_dict().items() if not name.startswith("image.regions.")}


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, row-major: what others' classes and files are given."""
    return {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}


def without(named: Mapping[str, Tensor], beside: Iterable[str]) -> dict[str, Tensor]:
    """`named` less what is no weight of a trunk."""
    apart = set(beside)
    return {name: t for name, t in named.items() if name not in apart}


@torch.no_grad()
def load(module: nn.Module, foreign: Mapping[str, Tensor], names: Names, where: str) -> None:
    """Copy `foreign` into the module's own tensors.

    Raises:
        UserError: names are missing, unexpected or misshapen; nothing was copied then.
    """
    own = module.state_dict()
    wanted = {theirs: rule.to_theirs(own[ours]) for ours, (theirs, rule) in names.items()}
    differ = differences(
        {n: tuple(t.shape) for n, t in wanted.items()}, {n: tuple(t.shape) for n, t in foreign.items()}
    )
    if differ:
        raise UserError(f"{where} does not fit this model:\n{differ}\nchoose the model it was made with")
    for ours, (theirs, rule) in names.items():
        own[ours].copy_(rule.to_ours(foreign[theirs]))


def differences(wanted: Mapping[str, Shape], found: Mapping[str, Shape], most: int = 12) -> str:
    """A table of the names whose shapes are not the same on both sides; empty when all are."""
    rows = [
        (name, wanted.get(name), found.get(name))
        for name in [*wanted, *(n for n in found if n not in wanted)]
        if wanted.get(name) != found.get(name)
    ]
    if not rows:
        return ""
    cells = [("tensor", "model", "file"), *((n, _shown(w), _shown(f)) for n, w, f in rows[:most])]
    widths = [max(len(row[i]) for row in cells) for i in range(2)]
    lines = [f"  {n:<{widths[0]}}  {w:<{widths[1]}}  {f}" for n, w, f in cells]
    return "\n".join(lines + ([f"  … and {len(rows) - most} more"] if len(rows) > most else []))


def _shown(shape: Shape | None) -> str:
    return "-" if shape is None else "x".join(map(str, shape)) or "scalar"
