"""Objectives by name: `pretrain.objectives.<name>`, or a module of your own given by its dotted path.

The module holds one subclass of `Objective` named by ``OBJECTIVE``. See docs/OBJECTIVES.md.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import Any

import torch
from pydantic import ValidationError

from pretrain.errors import UserError
from pretrain.objectives.base import Objective, RunFacts
from pretrain.philox import key

_NOT_OBJECTIVES = {"base", "joint"}


def build(wanted: dict[str, float | dict[str, Any]], facts: RunFacts) -> dict[str, Objective]:
    """Objectives of a recipe's `objectives` section, in its order; the same weights on every rank.

    Raises:
        UserError: no such objective (with the nearest name), or an option it does not know.
    """
    return {name: _build_one(name, options, facts) for name, options in wanted.items()}


def known() -> list[str]:
    """Names of the objectives that come with the package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg and m.name not in _NOT_OBJECTIVES)


def _build_one(name: str, wanted: float | dict[str, Any], facts: RunFacts) -> Objective:
    cls = find(name)
    given = {"weight": wanted} if isinstance(wanted, int | float) else wanted
    try:
        options = cls.Options.model_validate(given)
    except ValidationError as error:
        raise UserError("\n".join(_explain(name, cls, e) for e in error.errors())) from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(facts.seed, "objective", name) >> 1)
        return cls(options, facts)


def find(name: str) -> type[Objective]:
    """The class of an objective; UserError, with the nearest name, where there is none."""
    module_name = name if "." in name else f"{__name__}.{name}"
    if "." not in name and name not in known():
        near = difflib.get_close_matches(name, known(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known())}"
        raise UserError(f"objectives: no objective {name!r}; {hint}")
    try:
        return importlib.import_module(module_name).OBJECTIVE
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(f"objectives: {module_name} cannot be loaded as an objective: {error}") from None


def _explain(name: str, cls: type[Objective], error: Any) -> str:
    option = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(option, cls.Options.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(cls.Options.model_fields)}"
        return f"objectives.{name}: unknown key {option}; {hint}"
    where = f"objectives.{name}.{option}" if option else f"objectives.{name}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"
