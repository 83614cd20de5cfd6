"""A recipe's moving parts, put together: trunk, objectives, backend, and the step that drives them.

Training and replay must build the same run from the same recipe; this is the one place that does.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.backends import build_backend
from pretrain.backends.base import Backend
from pretrain.backends.replicated import Replicated
from pretrain.checkpoint import Checkpoint, Fragment
from pretrain.distributed.process import Process
from pretrain.distributed.syncbn import convert
from pretrain.errors import UserError
from pretrain.models import compute
from pretrain.models.lock import lock
from pretrain.models.trunk import Trunk, build_trunk
from pretrain.objectives import build
from pretrain.objectives.base import RunFacts
from pretrain.objectives.joint import Joint
from pretrain.optim.loss_scale import LossScale
from pretrain.probe import freeze_unreached, probe_inputs
from pretrain.recipe import Recipe
from pretrain.step import Step, TwoStage
from pretrain.weights.init import load_init

log = logging.getLogger(__name__)


@dataclass
class Parts:
    """What a training step works with."""

    joint: Joint
    backend: Backend
    replicated: Replicated
    two_stage: TwoStage
    step: Step
    parameters: int
    """Of the trunk; a backend may leave a rank only some of them."""

    def load(self, checkpoint: Checkpoint) -> None:
        """Take weights, optimizer, teacher and objective state from a checkpoint of any backend and world."""
        self.backend.load(checkpoint)
        self.replicated.load(checkpoint)
        self.step.loss_scale.load(checkpoint)

    def fragments(self) -> list[Fragment]:
        """All that this rank writes of them."""
        return self.backend.fragments() + self.replicated.fragments() + self.step.loss_scale.fragments()


def assemble(recipe: Recipe, samples: int, process: Process, checkpoint: Checkpoint | None = None) -> Parts:
    """The parts of `recipe` on this rank, as they were at `checkpoint`, or at their first weights.

    `samples` is how many an epoch has.

    Raises:
        UserError: a model, an objective or an option that cannot be built, or that does not fit another; first weights
            (`init`) that are not there or of another model.
    """
    trunk, joint, teacher = build_modules(recipe, samples, process.rank, process.world)
    if checkpoint is None and recipe.init is not None:  # before the backend, which copies a teacher and may shard
        report = load_init(trunk, joint, recipe.init)
        if process.first:
            log.info(f"{report}")
            for warning in report.warnings:
                log.warning(warning)
    context = recipe.model.text.context if recipe.model.text else 0
    unreached = freeze_unreached(trunk, probe_inputs(joint, recipe, context))
    if unreached and process.first:
        log.warning(f"{len(unreached)} tensors of the trunk are not trained: no objective reaches them")
    parameters = sum(p.numel() for p in trunk.parameters())
    compute.apply(trunk, recipe, process.device)
    backend = build_backend(trunk, recipe, process, teacher=teacher)
    replicated = Replicated(joint, recipe.optimizer, process)
    two_stage = TwoStage(
        backend, joint, accumulation=recipe.accumulation, seed=recipe.seed, rank=process.rank, group=None
    )
    step = Step(
        two_stage, replicated, LossScale(process, enabled=recipe.precision == "fp16"),
        clip_norm=recipe.optimizer.clip_norm, skip=recipe.faults.nan == "skip",
    )  # fmt: skip
    parts = Parts(joint, backend, replicated, two_stage, step, parameters)
    if checkpoint is not None:
        parts.load(checkpoint)
    return parts


def build_modules(recipe: Recipe, samples: int, rank: int, world: int) -> tuple[Trunk, Joint, bool]:
    """Trunk, objectives, and whether the trunk has a momentum teacher: what of `assemble` needs no backend."""
    trunk = build_trunk(recipe.model, seed=recipe.seed)
    facts = RunFacts(
        pooled_dim=trunk.pooled_dim,
        global_batch=recipe.global_batch,
        total_steps=recipe.total_steps(samples),
        samples=samples,
        seed=recipe.seed,
        rank=rank,
        world=world,
        regions=recipe.model.regions,
    )
    joint = Joint(build(recipe.objectives, facts))
    teacher = _has_teacher(joint, facts.total_steps)
    if world > 1:
        convert(joint)  # heads are cheap to synchronise, and their statistics must be equal on all ranks
        if recipe.model.sync_batchnorm:
            convert(trunk)
        elif teacher and any(isinstance(m, _BatchNorm) for m in trunk.modules()):
            raise UserError(
                "model.sync_batchnorm: false gives each rank other BatchNorm statistics, and so another momentum "
                "teacher; set it true, or choose a tower without BatchNorm"
            )
    lock(trunk, recipe.model.lock, joint.requests())
    if recipe.model.patch_dropout and any(r.from_layer is not None and not r.teacher for r in joint.requests()):
        raise UserError(
            "objectives ask for the tokens of inner blocks, which model.patch_dropout leaves out some of; set it to 0"
        )
    return trunk, joint, teacher


def _has_teacher(joint: Joint, total_steps: int) -> bool:
    """Whether an objective has one; UserError, before anything is trained, where two want it at different speeds."""
    asked = [joint.teacher_momentum(step) for step in (0, total_steps // 2, total_steps - 1)]
    return asked[0] is not None
