"""A recipe's moving parts, put together: trunk, objectives, backend, and the step that drives them.

Training and replay must build the same run from the same recipe; this is the one place that does.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.backends.ddp import DDP
from pretrain.backends.replicated import Replicated
from pretrain.checkpoint import Checkpoint
from pretrain.distributed.process import Process
from pretrain.distributed.syncbn import convert
from pretrain.errors import UserError
from pretrain.models.trunk import build_trunk
from pretrain.objectives import build
from pretrain.objectives.base import RunFacts
from pretrain.objectives.joint import Joint
from pretrain.recipe import Recipe
from pretrain.step import TwoStage


@dataclass
class Parts:
    """What a training step works with."""

    joint: Joint
    backend: DDP
    replicated: Replicated
    two_stage: TwoStage

    def load(self, checkpoint: Checkpoint) -> None:
        """Take weights, optimizer, teacher and objective state from a checkpoint of any world."""
        self.backend.load(checkpoint)
        self.replicated.load(checkpoint)


def assemble(recipe: Recipe, samples: int, process: Process) -> Parts:
    """The parts of `recipe` on this rank, at their first weights; `samples` is how many an epoch has.

    Raises:
        UserError: a model, an objective or an option that cannot be built, or that does not fit another.
    """
    trunk = build_trunk(recipe.model, seed=recipe.seed)
    facts = RunFacts(
        pooled_dim=trunk.pooled_dim,
        global_batch=recipe.global_batch,
        total_steps=recipe.total_steps(samples),
        samples=samples,
        seed=recipe.seed,
        rank=process.rank,
        world=process.world,
        regions=recipe.model.regions,
    )
    joint = Joint(build(recipe.objectives, facts))
    teacher = _has_teacher(joint, facts.total_steps)
    if process.world > 1:
        convert(joint)  # heads are cheap to synchronise, and their statistics must be equal on all ranks
        if recipe.model.sync_batchnorm:
            convert(trunk)
        elif teacher and any(isinstance(m, _BatchNorm) for m in trunk.modules()):
            raise UserError(
                "model.sync_batchnorm: false gives each rank other BatchNorm statistics, and so another momentum "
                "teacher; set it true, or choose a tower without BatchNorm"
            )
    backend = DDP(trunk, recipe, process, teacher=teacher)
    replicated = Replicated(joint, recipe.optimizer, process)
    two_stage = TwoStage(
        backend, joint, accumulation=recipe.accumulation, seed=recipe.seed, rank=process.rank, group=None
    )
    return Parts(joint, backend, replicated, two_stage)


def _has_teacher(joint: Joint, total_steps: int) -> bool:
    """Whether an objective has one; UserError, before anything is trained, where two want it at different speeds."""
    asked = [joint.teacher_momentum(step) for step in (0, total_steps // 2, total_steps - 1)]
    return asked[0] is not None
