"""What one backend gives at one world and accumulation: a step as training takes it, and how far its gradients are off.

`certify_world` is called by all ranks of a world together, one cell after the other in one process group.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pretrain.certify.batch import global_batch
from pretrain.certify.shrink import ROWS, SAMPLES
from pretrain.distributed.collectives import all_reduce_max
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.parts import Parts, assemble
from pretrain.reader import Batch
from pretrain.recipe import Recipe

Gradients = Mapping[str, Tensor]
Expected = Mapping[str, Gradients]
"""Float64 gradients by `key_of`: of the whole batch at once and, where a tower's BatchNorm sees a part of it at a time,
of the same parts."""


def key_of(drawn: torch.dtype, world: int = 1, accumulation: int = 1) -> str:
    """Of the gradients at the first weights as they are drawn in this precision."""
    return f"{drawn} {world} {accumulation}"


BAR = 1e-5
WARM = 2
"""Steps before the one that is certified, where objectives have a state: so many global batches fill the queue."""
ZERO = 1e-10
"""A gradient this much smaller than the largest is zero by the formula (a bias in front of a BatchNorm); what is found
in its place is held against the largest instead."""


@dataclass(frozen=True)
class Cell:
    """One backend at one world and accumulation."""

    backend: str
    world: int
    accumulation: int
    verdict: Literal["PASS", "FAIL", "approx", "refused"]
    figure: float | None = None
    """max |g - g64| / max |g64| of the worst parameter over all ranks, in fp32; None: nothing was run. approx: g64 is
    normalised in the same parts."""
    parameter: str | None = None
    """The worst one."""
    figure64: float | None = None
    """The same of the same backend in float64, where fp32 is above the bar: what is then not rounding, but that
    zero1-3 reduce in fp32 also then."""
    parameter64: str | None = None
    away: float | None = None
    """approx: how far it is from the gradient of the whole batch normalised at once."""
    note: str = ""
    """Which engine ran, or why it refused."""


def certify_world(
    process: Process, recipe: Recipe, expected: Expected, backends: Sequence[str], accumulations: Sequence[int]
) -> list[Cell]:
    """All cells of one world."""
    return [_cell(process, recipe, expected, b, a) for b in backends for a in accumulations]


def _cell(process: Process, recipe: Recipe, expected: Expected, backend: str, accumulation: int) -> Cell:
    place = (backend, process.world, accumulation)
    own = recipe.model_copy(update={"backend": backend, "accumulation": accumulation})
    try:
        parts = assemble(own, SAMPLES, process)
    except UserError as error:
        return Cell(*place, "refused", note=str(error))
    except RuntimeError as error:  # on all ranks alike, so that the other cells can go on
        return Cell(*place, "FAIL", note=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    whole, same_parts = key_of(torch.float32), key_of(torch.float32, *place[1:])
    found, engine = gradients_of(parts, last_step(parts, own, process)), parts.backend.describe()
    approximate = same_parts in expected and same_parts != whole
    figure, name = worst(found, expected[same_parts if approximate else whole])
    held = Cell(
        *place, "approx" if approximate else "PASS", figure, name,
        away=worst(found, expected[whole])[0] if approximate else None, note=engine,
    )  # fmt: skip
    del parts
    gc.collect()  # hooks hold their modules in circles
    if figure <= BAR:
        return held
    with drawn_in(torch.float64):
        exact = assemble(own, SAMPLES, process)
    wanted = expected[key_of(torch.float64, *place[1:]) if approximate else key_of(torch.float64)]
    figure64, name64 = worst(gradients_of(exact, last_step(exact, own, process)), wanted)
    verdict = held.verdict if figure64 <= BAR else "FAIL"
    return replace(held, verdict=verdict, figure64=figure64, parameter64=name64)


@contextmanager
def drawn_in(dtype: torch.dtype) -> Iterator[None]:
    """Within, weights are drawn, and modules made, in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def last_step(parts: Parts, recipe: Recipe, process: Process) -> Batch:
    """This rank's rows of the step that is certified, everything before it done: queues and centres hold something.

    No weight is changed on the way.
    """

    def mine(step: int) -> Batch:
        rows = ROWS // process.world
        return global_batch(recipe, parts.joint, step).rows(process.rank * rows, (process.rank + 1) * rows)

    if process.world > 1:
        parts.backend.warm_up(parts.two_stage.inputs(mine(0).rows(0, ROWS // (process.world * recipe.accumulation))))
    last = WARM if any(True for _ in parts.joint.members.buffers()) else 0
    for step in range(last):
        parts.joint.before_step(step)
        gradients_of(parts, mine(step))
        parts.joint.after_step(step)
    parts.joint.before_step(last)
    return mine(last)


def gradients_of(parts: Parts, batch: Batch) -> Gradients:
    """The mean gradient of every parameter of trunk and objectives for one step, as `update` would find it."""
    parts.replicated.reduce(parts.two_stage(batch).loss)
    found = parts.backend.gradients() | parts.replicated.gradients()
    parts.backend.drop_gradients()
    parts.replicated.drop_gradients()
    return found


def worst(found: Gradients, expected: Gradients) -> tuple[float, str]:
    """(max |g - g64| / max |g64|, name) of the parameter for which it is greatest, over all ranks."""
    names = sorted(expected)
    largest = max(float(g.abs().max()) for g in expected.values())
    errors = [_error(found.get(name), expected[name], largest) for name in names]
    names.append("a parameter that is not trained")
    errors.append(torch.inf if found.keys() - expected.keys() else 0.0)
    figures = torch.tensor(errors, dtype=torch.float64).nan_to_num(nan=torch.inf)
    figure, place = all_reduce_max(figures).max(0)
    return float(figure), names[int(place)]


def _error(found: Tensor | None, expected: Tensor, largest: float) -> float:
    own = float(expected.abs().max())
    scale = own if own > ZERO * largest else largest
    difference = expected if found is None else found.double() - expected
    return float(difference.abs().max()) / scale if scale else 0.0
