"""DeepSpeed's ZeRO: stage 1 spreads the optimizer state over the ranks, 2 the gradients too, 3 the weights too.

`deepspeed.initialize` around the trunk and our own optimizer. DeepSpeed partitions, gathers and reduces (fp32); all
that decides numbers is ours: clipping, learning rates, loss scale, accumulation and autocast are off in its
configuration, where most of them have a default that would silently change the run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.backends.base import Backend, Inputs
from pretrain.backends.zero_state import Piece, cuts, load_optimizer, optimizer_fragments, pieces, reduced
from pretrain.checkpoint import Checkpoint, Fragment, slice_for_rank
from pretrain.distributed.process import Process, ensure_group
from pretrain.errors import UserError
from pretrain.models.image import ImageTower
from pretrain.models.momentum import MomentumCopy, ema_momentum
from pretrain.models.request import FeatureRequest
from pretrain.models.text import TextTower
from pretrain.models.trunk import Trunk
from pretrain.optim.build import build_optimizer, set_rates
from pretrain.optim.schedule import Rates
from pretrain.recipe import Recipe
from pretrain.weights.native import load_trunk, stored_names
from pretrain.weights.which import Which

TOWERS = (ImageTower, TextTower)

BUCKET = 50_000_000
"""Elements reduced at once, at most: DeepSpeed holds a buffer of so many."""
KEPT_WHOLE = 100_000
"""Stage 3: a tensor of at most so many elements stays whole on every rank between forward and backward."""


class Zero(Backend):
    """See `pretrain.backends.base.Backend`."""

    def __init__(self, trunk: Trunk, recipe: Recipe, process: Process, *, teacher: bool = False) -> None:
        stage_3 = recipe.backend == "zero3"  # DeepSpeed moves what it partitions, one engine after the other
        super().__init__(trunk if stage_3 else trunk.to(process.device), recipe, process, teacher=teacher)
        deepspeed = _deepspeed(recipe, process)
        for p in (p for trunk in self.weights().values() for p in trunk.parameters()):
            # partitions are row-major, whatever layout a tower likes
            p.data = p.data.clone(memory_format=torch.contiguous_format)
        self._optimizer = build_optimizer(dict(trunk.named_parameters()), recipe.optimizer)
        towers, config = _Autocast(self.trunk, self.autocast), _config(recipe, self.trunk)
        with _as_pairs(towers, self.trunk):
            self._engine, *_ = deepspeed.initialize(model=towers, optimizer=self._optimizer, config=config)
        self._zero: Any = self._engine.optimizer
        self._stage: int = self._engine.zero_optimization_stage()
        self._engine.set_gradient_accumulation_boundary(True)
        self._copy_engines = []
        for of, trunk in self.weights().items() if self._stage == 3 else ():
            if of != "model":  # without an optimizer: partitioned as the model is, gathered where it is called
                with _as_pairs(trunk):
                    self._copy_engines.append(deepspeed.initialize(model=trunk, config=config)[0])

    @property
    def wrapped(self) -> nn.Module:
        return self._engine

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def backward(self, features: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        # the engine takes scalars only; this one has the given gradients
        carrying = [(f * g).sum() for f, g in zip(features, gradients) if f.requires_grad]
        self._engine.backward(torch.stack(carrying).sum(), scale_wrt_gas=False)

    def squared_norm(self) -> Tensor:
        norms = torch._foreach_norm(self._reduced())
        total = torch.zeros((), dtype=torch.float64, device=self.process.device)
        if norms:
            total += torch.stack(norms).double().square().sum().to(total.device)
        dist.all_reduce(total)
        return total

    def scale_gradients(self, factor: Tensor) -> None:
        for gradient in self._reduced():
            gradient.mul_(factor.to(gradient))

    def step(self, rates: Rates) -> None:
        set_rates(self._optimizer, rates)
        self._engine.step()

    def drop_gradients(self) -> None:
        # what DeepSpeed does itself with a step it skips
        if self._stage == 3:
            self._zero._pre_step()
            self._zero._overflow_clean_up(1.0)
            return
        self._zero.zero_grad(set_to_none=True)
        self._zero.averaged_gradients.clear()
        self._zero.all_grad_tensors.clear()
        self._zero.micro_step_id = -1
        if self._zero.cpu_offload:
            self._zero.reset_cpu_buffers()

    def gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        trained = [(n, p) for n, p in self.trunk.named_parameters() if p.requires_grad]
        return {n: safe_get_full_grad(p).detach().cpu().clone() for n, p in trained}

    def _reduced(self) -> list[Tensor]:
        return reduced(self._zero, self.trunk.parameters(), self.process.rank)

    # ---- copies that follow

    def update_teacher(self, momentum: float, step: int) -> None:
        assert self.teacher is not None
        self._follow(self.teacher, momentum, step)

    def update_ema(self, step: int) -> None:
        if self.ema is not None and self.recipe.ema is not None:
            self._follow(self.ema, ema_momentum(self.recipe.ema, step), step)

    @torch.no_grad()
    def _follow(self, copy: MomentumCopy, momentum: float, step: int) -> None:
        if self._stage < 3:  # weights are whole
            copy.update(self.trunk, momentum, step)
            return
        with self._partitioned():
            copy.update(self.trunk, momentum, step)  # the buffers: of partitioned weights nothing is there
            its = [p.ds_tensor for p in self.trunk.parameters()]  # type: ignore[attr-defined]
            torch._foreach_lerp_([p.ds_tensor for p in copy.copy.parameters()], its, 1.0 - momentum)

    @contextmanager
    def _partitioned(self) -> Iterator[None]:
        """Within, no weight of stage 3 is whole anywhere, so that its partition may be changed."""
        holders = [self._zero.parameter_offload, *(engine.optimizer for engine in self._copy_engines)]
        for holder in holders:
            holder.partition_all_parameters()
        yield
        for holder in holders:
            if kept := holder.persistent_parameters:
                kept[0].all_gather(kept)

    # ---- the checkpoint

    def fragments(self) -> list[Fragment]:
        rank = self.process.rank
        own = list(optimizer_fragments(self._pieces(), self._optimizer))
        tensors: dict[str, Tensor] = {}
        for of, trunk in self.weights().items():
            sharded = dict(trunk.named_parameters()) if self._stage == 3 else {}
            tensors |= {f"{of}.{n}": t for n, t in trunk.state_dict().items() if n not in sharded}
            own += [
                Fragment(f"{of}.{n}", shape, data.dtype, offset, data)
                for n, shape, offset, data in cuts(sharded.items(), rank)
            ]
        return slice_for_rank(tensors, rank, self.process.world) + own

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        if self._stage == 3:
            with self._partitioned():
                for of, trunk in self.weights().items():
                    self._load_cuts(trunk, checkpoint, of)
        else:
            for of, trunk in self.weights().items():
                load_trunk(trunk, checkpoint, of)
        self._zero.refresh_fp32_params()
        load_optimizer(self._pieces(), self._optimizer, checkpoint)

    def _load_cuts(self, trunk: Trunk, checkpoint: Checkpoint, of: Which) -> None:
        own = trunk.state_dict()
        sharded: dict[str, Any] = dict(trunk.named_parameters())
        shapes = {n: tuple(sharded[n].ds_shape if n in sharded else t.shape) for n, t in own.items()}
        stored = stored_names(shapes, checkpoint, of, trunk.image.name)
        for name, _, offset, data in cuts(sharded.items(), self.process.rank):
            data.copy_(checkpoint.read_range(stored[name], offset, offset + len(data)))
        for name in own.keys() - sharded.keys():
            own[name].copy_(checkpoint.read(stored[name]))

    def _pieces(self) -> list[Piece]:
        return pieces(self._zero, self.trunk.named_parameters(), self.process.rank)

    def describe(self) -> str:
        stage = getattr(self._zero, "zero_stage_string", "ZeRO-3")
        world = dist.get_world_size(self._zero.dp_process_group)
        return f"DeepSpeed {stage} on {world} x {self.process.device.type}"


class _Autocast(nn.Module):
    """The trunk under our autocast: DeepSpeed turns off what is around its engine."""

    def __init__(self, trunk: Trunk, autocast: Callable[[], AbstractContextManager]) -> None:
        super().__init__()
        self.trunk, self._autocast = trunk, autocast

    def forward(self, inputs: Inputs) -> dict[FeatureRequest, Tensor]:
        with self._autocast():
            return self.trunk(inputs)


@contextmanager
def _as_pairs(*modules: Any) -> Iterator[None]:
    """Around what hooks itself onto trunks: ZeRO-3 cannot read mappings whose keys are no strings, so its hooks are
    given lists of pairs."""
    mapped = [m for module in modules for m in (module, *(c for c in module.children() if c.__class__ in TOWERS))]
    for module in mapped:
        module.register_forward_hook(lambda _module, _inputs, output: list(output.items()))
    yield
    for module in mapped:
        module.register_forward_hook(lambda _module, _inputs, output: dict(output))


def _deepspeed(recipe: Recipe, process: Process) -> Any:
    """The package, its process group there and its talk off."""
    if process.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ImportError:
        raise UserError(f"backend {recipe.backend} needs DeepSpeed: pip install 'polyview[deepspeed]'") from None
    os.environ.setdefault("LOCAL_RANK", str(process.local_rank))  # where no `process_group` has
    deepspeed.utils.logger.setLevel(logging.ERROR)  # its warnings are of what we chose
    # a C++ collective for inference, compiled for minutes at first use
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ensure_group(process)
    return deepspeed


def _config(recipe: Recipe, trunk: Trunk) -> dict[str, Any]:
    stage = int(recipe.backend.removeprefix("zero"))
    trained = sum(p.numel() for p in trunk.parameters() if p.requires_grad)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": min(BUCKET, trained)}
    if stage == 3:
        # 0: weights are dropped after a module's forward, however soon they are needed again
        zero |= {"stage3_param_persistence_threshold": KEPT_WHOLE, "stage3_max_reuse_distance": 0}
    if recipe.sharding.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    elif stage < 3:
        zero["compute_grad_norm"] = False
    return {
        "train_micro_batch_size_per_gpu": 1,  # of no effect without its data loader
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
