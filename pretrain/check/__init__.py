"""A recipe looked at before it is run: its data, model, memory, batch, schedule and time, and what would go wrong.

It builds objectives and views as training does, on torch's meta device: nothing is started, nothing is written (but
the cache of class numbers, where `data.classes_per_batch` reads them), and a model of any size takes no memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from pretrain.check import data, fit, memory, plan, sharding
from pretrain.check.memory import Modules
from pretrain.data import open_data
from pretrain.errors import UserError
from pretrain.evaluation import check_evaluation
from pretrain.recipe import Recipe
from pretrain.run import RunFolder

T = TypeVar("T")


@dataclass
class Report:
    """What was found, section by section. Names of numbers end in their unit where they have one."""

    sections: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Worth knowing; the run is not spoiled."""
    problems: list[str] = field(default_factory=list)
    """What would refuse or spoil the run, each once."""

    def refused(self, tried: Callable[[], T]) -> T | None:
        """What `tried` gives, or None and a problem in the very words that training would refuse with."""
        try:
            return tried()
        except UserError as error:
            self.problem(str(error))
            return None

    def problem(self, line: str) -> None:
        if line not in self.problems:
            self.problems.append(line)


def check(
    recipe: Recipe,
    *,
    world: int = 1,
    samples: int | None = None,
    images_per_s: float | None = None,
    gpu_bytes: int | None = None,
) -> Report:
    """Everything that can be known of `recipe` before it runs on `world` ranks.

    samples: an epoch's, where the shards are not here. images_per_s: of the whole job. gpu_bytes: of one GPU.
    """
    report = Report()
    recipe = _split(report, recipe, world, gpu_bytes)
    report.sections["recipe"] = plan.essentials(recipe, world)
    held = data.look(recipe)
    report.sections["data"] = [h.facts() for h in held]
    for line in plan.problems(recipe, world):
        report.problem(line)
    for h in held:
        if h.problem and samples:  # whoever says how many there are knows that they are not here
            report.notes.append(f"not looked at: {h.problem}")
        elif h.problem:
            report.problem(h.problem)
    report.refused(lambda: RunFolder(recipe.output).check(recipe))
    if not samples:  # else the shards are not here
        report.refused(lambda: check_evaluation(recipe))
    samples = _samples(recipe, held, report) or samples
    steps = recipe.total_steps(samples) if samples else recipe.steps
    if steps is None:
        report.problem("the shards are not here and the recipe counts epochs: give --samples N, an epoch's samples")
    else:
        report.sections["plan"] = plan.plan(recipe, steps, samples, images_per_s)
        for line in plan.schedule_problems(recipe, steps):
            report.problem(line)
    modules = report.refused(lambda: memory.build(recipe, samples or recipe.global_batch, world))
    if modules is not None:
        _modules(report, recipe, modules, held=held, steps=steps, world=world, gpu_bytes=gpu_bytes)
    return report


def _split(report: Report, recipe: Recipe, world: int, gpu_bytes: int | None) -> Recipe:
    """With the accumulation that its `local_batch`, which it keeps, comes to."""
    if recipe.local_batch == "auto" and not gpu_bytes:
        report.notes.append("local_batch: auto is looked at as if all fitted at once; --gpu-memory says what does")
        return recipe
    tried = report.refused(lambda: fit.resolve_local_batch(recipe, world, torch.device("cuda"), gpu_bytes))
    return recipe.model_copy(update={"accumulation": tried.accumulation}) if tried else recipe


def _samples(recipe: Recipe, held: list[data.Held], report: Report) -> int | None:
    """Samples an epoch, once the order they are seen in is found to be possible; None where shards are missing."""
    sources = [h.source for h in held if h.source is not None]
    if len(sources) < len(held):
        return None
    opened = report.refused(lambda: open_data(recipe, sources))
    return opened[1].samples if opened else sum(s.samples for s in sources)


def _modules(
    report: Report,
    recipe: Recipe,
    modules: Modules,
    *,
    held: list[data.Held],
    steps: int | None,
    world: int,
    gpu_bytes: int | None,
) -> None:
    problems, notes = data.missing(held, modules.joint, recipe)
    report.notes += notes
    for line in problems:
        report.problem(line)
    tokens = report.refused(lambda: data.caption_tokens(recipe, held))
    if tokens is None:
        return
    modules.tokens = tokens
    cost = report.refused(lambda: modules.cost(recipe))
    report.sections["model"] = _model(recipe, modules, cost)
    if cost is not None:
        report.refused(lambda: _memory(report, recipe, modules, steps, world, gpu_bytes))


def _memory(
    report: Report, recipe: Recipe, modules: Modules, steps: int | None, world: int, gpu_bytes: int | None
) -> None:
    room = memory.rank(recipe, modules, world=world)
    report.sections["memory of a rank"] = {"caption_tokens": modules.tokens} | room
    if world > 1:
        report.sections["memory of a rank by backend"] = fit.by_backend(recipe, modules, world)
    if gpu_bytes and recipe.local_batch != "auto" and room["total_bytes"] > fit.RESERVE * gpu_bytes:
        report.problem(fit.advice(recipe, modules, gpu_bytes, world))
    alone = recipe.model_copy(update={"backend": "ddp"})  # whole, as in a checkpoint
    state = sharding.state(alone, modules.trunk, modules.joint, modules.teacher, world=1)
    kept = plan.checkpoints(recipe, steps, sum(state.values()) - state["gradients"])
    report.sections["checkpoints"] = kept
    if note := plan.disk(recipe, kept.get("most_bytes", 0)):
        report.notes.append(note)


def _model(recipe: Recipe, modules: Modules, cost: dict[str, Any] | None) -> dict[str, Any]:
    trunk, joint = modules.trunk, modules.joint
    parts: dict[str, nn.Module | None] = {f"image ({recipe.model.image})": trunk.image, "text": trunk.text}
    parts |= {f"objective {name}": objective for name, objective in joint.by_name.items()}
    crops = Counter(view.size for view in joint.image_views(recipe.model.image_size))
    return {
        "parameters": {name: _count(part) for name, part in parts.items() if part is not None},
        "trained": _count(trunk, trained=True) + _count(joint, trained=True),
        "copies": ", ".join(n for n, there in (("teacher", modules.teacher), ("ema", recipe.ema)) if there) or "none",
        "crops_an_image": ", ".join(f"{n} x {size}" for size, n in crops.items()) or "none",
        "texts_a_sample": len(joint.text_views()),
        "mflops_forward_a_sample": cost["mflops"] if cost else None,
    }


def _count(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)
