"""What the gradients are: float64, one process, one micro-step, by the textbook's formulas."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretrain.certify.cells import Gradients, drawn_in, gradients_of, last_step, worst
from pretrain.certify.shrink import SAMPLES
from pretrain.certify.textbook import textbook
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.parts import Parts, assemble
from pretrain.reader import Batch
from pretrain.recipe import Recipe

FLOAT64_BAR = 1e-10


@dataclass(frozen=True)
class Reference:
    """Float64 gradients of every trained parameter."""

    gradients: Gradients
    source: str
    """By which formula, and how far the training step is from it in float64."""


def reference(recipe: Recipe, drawn: torch.dtype) -> Reference:
    """The gradients that all others are held against, at the first weights as they are drawn in `drawn`.

    Raises:
        UserError: the training step's own gradients are, in float64 on one process, not the textbook's.
    """
    process = Process(0, 1, 0, torch.device("cpu"))
    with drawn_in(drawn):
        parts = assemble(recipe.model_copy(update={"backend": "ddp", "accumulation": 1}), SAMPLES, process)
    for module in (*parts.backend.weights().values(), parts.joint.members):
        module.double()
    batch = last_step(parts, recipe, process)
    by_formula = _by_formula(parts, batch)
    by_step = gradients_of(parts, batch)
    if by_formula is None:
        return Reference(by_step, "the training step in float64 on one process (no formula of a plug-in is known)")
    figure, name = worst(by_step, by_formula)
    if not figure <= FLOAT64_BAR:
        raise UserError(
            f"in float64, on one process, the gradient of {name} is {figure:.1e} off the textbook's formula: the "
            "objective's own loss is wrong, whatever the backend"
        )
    return Reference(by_formula, f"the textbook's formula in float64; the step itself, in float64, is {figure:.0e} off")


def _by_formula(parts: Parts, batch: Batch) -> Gradients | None:
    """Plain autograd through towers, heads and formula."""
    features = parts.backend.forward(parts.two_stage.inputs(batch))
    loss = textbook(parts.joint, features, batch)
    if loss is None:
        return None
    named = dict(parts.backend.trunk.named_parameters())
    named |= {f"objective.{n}": p for n, p in parts.joint.members.named_parameters()}
    trained = {n: p for n, p in named.items() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(trained.items(), found)}
