"""What the gradients are: float64, one process, one micro-step, by the textbook's formulas.

Where a tower's BatchNorm sees a part of the batch at a time, the same parts are normalised here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.certify.cells import Gradients, drawn_in, gradients_of, key_of, last_step, worst
from pretrain.certify.shrink import ROWS, SAMPLES
from pretrain.certify.textbook import textbook
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.models.trunk import Trunk
from pretrain.parts import Parts, assemble
from pretrain.reader import Batch
from pretrain.recipe import ComputeRecipe, Recipe

FLOAT64_BAR = 1e-10


@dataclass(frozen=True)
class Reference:
    """Float64 gradients of every trained parameter."""

    gradients: Gradients
    source: str
    """By which formula, and how far the training step is from it in float64."""
    batchnorm: bool
    """Whether a tower normalises by the batch."""


def references(recipe: Recipe, worlds: Sequence[int], accumulations: Sequence[int]) -> tuple[dict[str, Gradients], str]:
    """All that cells are held against, and its source.

    Raises:
        UserError: as `reference`.
    """
    found: dict[str, Gradients] = {}
    for drawn in (torch.float64, torch.float32):
        whole = reference(recipe, drawn)
        found[key_of(drawn)] = whole.gradients
        for world, k in product(worlds, accumulations):
            if whole.batchnorm and (k > 1 or (world > 1 and not recipe.model.sync_batchnorm)):
                found[key_of(drawn, world, k)] = reference(recipe, drawn, world, k).gradients
    return found, whole.source


def reference(recipe: Recipe, drawn: torch.dtype, world: int = 1, accumulation: int = 1) -> Reference:
    """The gradients that all others are held against, at the first weights as they are drawn in `drawn`, with the
    towers' BatchNorm over what it sees at a time on `world` ranks.

    Raises:
        UserError: the training step's own gradients are, in float64 on one process, not the textbook's.
    """
    process = Process(0, 1, 0, torch.device("cpu"))
    with drawn_in(drawn):
        alone = {"backend": "ddp", "accumulation": 1, "compute": ComputeRecipe()}
        parts = assemble(recipe.model_copy(update=alone), SAMPLES, process)
    for module in (*parts.backend.weights().values(), parts.joint.members):
        module.double()
    batchnorm = _normalise_parts(parts.backend.trunk, world, accumulation, together=recipe.model.sync_batchnorm)
    batch = last_step(parts, recipe, process)
    by_formula = _by_formula(parts, batch)
    by_step = gradients_of(parts, batch)
    if by_formula is None:
        source = "the training step in float64 on one process (no formula of a plug-in is known)"
        return Reference(by_step, source, batchnorm)
    figure, name = worst(by_step, by_formula)
    if not figure <= FLOAT64_BAR:
        raise UserError(
            f"in float64, on one process, the gradient of {name} is {figure:.1e} off the textbook's formula: the "
            "objective's own loss is wrong, whatever the backend"
        )
    source = f"the textbook's formula in float64; the step itself, in float64, is {figure:.0e} off"
    return Reference(by_formula, source, batchnorm)


def _normalise_parts(trunk: Trunk, world: int, accumulation: int, *, together: bool) -> bool:
    """Have the towers' BatchNorm see one micro-step's rows at a time, of all ranks or of each by itself; whether they
    have any."""
    crops = [1]  # of one size, which the tower takes in one call
    trunk.image.register_forward_pre_hook(lambda _, args: crops.__setitem__(0, len(args[0]) // ROWS))

    def forward(whole: Callable, x: Tensor) -> Tensor:
        sizes, axis = ((world, accumulation, -1), 2) if together else ((world * accumulation, -1), 1)
        parts = x.unflatten(0, (crops[0], *sizes)).unbind(axis)  # LeFF has the patches of a row in its first dimension
        leading = len(sizes)
        done = [whole(p.flatten(0, leading - 1)).unflatten(0, p.shape[:leading]) for p in parts]
        return torch.stack(done, axis).flatten(0, leading)

    normalising = [m for m in trunk.modules() if isinstance(m, _BatchNorm) and m.training]
    for module in normalising:
        module.forward = partial(forward, module.forward)  # type: ignore[method-assign]
    return bool(normalising)


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
