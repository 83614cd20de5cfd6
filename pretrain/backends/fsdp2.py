"""torch's `fully_shard`: every rank keeps 1/W of each weight, gradient and optimizer state, a block is made whole while
it runs.

Blocks of the towers are sharded one by one, and what is in none of them (embeddings, norms, projections) with the
root. The weights are fp32 DTensors, gathered and reduced in fp32; low precision is autocast's, as under DDP, so what it
casts for the backward stays whole unless `compute.checkpoint_blocks` computes it again. BatchNorm's buffers are each
rank's own, as under DDP. The teacher and the average are sharded alike, so they follow shard by shard.

With `sharding.within` n, groups of n ranks share one copy and the groups are replicas (HSDP, Zhao et al. 2023, §3.2).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pretrain.backends.base import Backend
from pretrain.backends.gradients import drop, scale, squared_norm
from pretrain.backends.state import fill, load_optimizer, optimizer_tensors
from pretrain.checkpoint import Checkpoint, Fragment, slice_for_rank
from pretrain.distributed.process import Process, ensure_group
from pretrain.distributed.shards import own_part, whole
from pretrain.errors import UserError
from pretrain.models.compute import units
from pretrain.models.trunk import Trunk
from pretrain.optim.build import build_optimizer, set_rates
from pretrain.optim.schedule import Rates
from pretrain.recipe import Recipe, ShardingRecipe
from pretrain.weights.native import stored_names


class FSDP2(Backend):
    """See `pretrain.backends.base.Backend`."""

    def __init__(self, trunk: Trunk, recipe: Recipe, process: Process, *, teacher: bool = False) -> None:
        super().__init__(trunk, recipe, process, teacher=teacher)
        ensure_group(process)
        _quiet()
        self._mesh = _mesh(process, recipe.sharding.within)
        for kept in self.weights().values():
            _shard(kept, self._mesh, recipe.sharding)
        # kept here, since between forward and backward a module shows whole tensors in their place
        self._named = dict(trunk.named_parameters())
        self._optimizer = build_optimizer(self._named, recipe.optimizer)

    @property
    def wrapped(self) -> nn.Module:
        return self.trunk

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self._reduce_next(last)
        try:
            yield
        finally:
            self._reduce_next(True)

    def _reduce_next(self, now: bool) -> None:
        assert isinstance(self.trunk, FSDPModule)
        self.trunk.set_requires_gradient_sync(now)
        self.trunk.set_is_last_backward(now)

    def squared_norm(self) -> Tensor:
        norm = squared_norm(self._named.values(), self.process.device).to(self.process.device)
        dist.all_reduce(norm, group=self._mesh.get_group("shard"))  # replicas hold the same: they count once
        return norm

    def scale_gradients(self, factor: Tensor) -> None:
        scale(self._named.values(), factor)

    def step(self, rates: Rates) -> None:
        set_rates(self._optimizer, rates)
        self._optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        drop(self._named.values())

    def gradients(self) -> dict[str, Tensor]:
        return {n: whole(p.grad).detach().cpu().clone() for n, p in self._named.items() if p.grad is not None}

    def fragments(self) -> list[Fragment]:
        tensors = {f"{of}.{name}": t for of, trunk in self.weights().items() for name, t in trunk.state_dict().items()}
        tensors |= optimizer_tensors("optim", self._optimizer, self._named)
        alike = {name: t for name, t in tensors.items() if not isinstance(t, DTensor)}
        fragments = slice_for_rank(alike, self.process.rank, self.process.world)
        for name, t in tensors.items():
            if isinstance(t, DTensor):
                offset, part = own_part(t)
                if len(part):
                    fragments.append(Fragment(name, tuple(t.shape), t.dtype, offset, part))
        return fragments

    def load(self, checkpoint: Checkpoint) -> None:
        for of, trunk in self.weights().items():
            tensors = trunk.state_dict()
            shapes = {name: tuple(t.shape) for name, t in tensors.items()}
            stored = stored_names(shapes, checkpoint, of, trunk.image.name)
            for name, tensor in tensors.items():
                fill(tensor, checkpoint, stored[name])
        load_optimizer("optim", self._optimizer, self._named, checkpoint)

    def describe(self) -> str:
        sharded = sum(isinstance(p, DTensor) and p.placements[-1].is_shard() for p in self._named.values())
        said = f"FSDP2 on {self.process.world} x {self.process.device.type}"
        if self._mesh.ndim > 1:
            said += f" ({self._mesh.size(0)} copies over {self._mesh.size(1)} ranks each)"
        said += f", {sharded} of {len(self._named)} tensors sharded"
        return said + ", in host memory" * self.recipe.sharding.offload


def _mesh(process: Process, within: int | None) -> DeviceMesh:
    """All ranks in a row, or in rows of `within`."""
    world = process.world
    if within is None or within == world:
        return init_device_mesh(process.device.type, (world,), mesh_dim_names=("shard",))
    if world % within:
        fit = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise UserError(f"sharding.within {within} does not divide the world of {world} ranks; take one of {fit}")
    names = ("replicate", "shard")
    return init_device_mesh(process.device.type, (world // within, within), mesh_dim_names=names)


def _shard(trunk: Trunk, mesh: DeviceMesh, recipe: ShardingRecipe) -> None:
    """Block by block, then the rest; in place."""
    _make_contiguous(trunk)
    # pinned memory is the GPU's
    pin = mesh.device_type == "cuda"
    policy = CPUOffloadPolicy(pin_memory=pin) if recipe.offload else OffloadPolicy()
    # None: all but the root, whose weights the backward needs first
    reshard = None if recipe.reshard_after_forward else False
    towers = [trunk.image.backbone] if trunk.text is None else [trunk.image.backbone, trunk.text]
    for module in (*(block for tower in towers for block in units(tower)), trunk):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, offload_policy=policy)
    trunk.register_forward_hook(_settle)


def _make_contiguous(trunk: nn.Module) -> None:
    """fully_shard takes no other layout, and gathers into none: of channels-last weights the rows stay, the memory
    order does not."""
    for p in trunk.parameters():
        p.data = p.data.contiguous()


def _quiet() -> None:
    """torch's warnings of its own calls, and of features that are views: nothing changes a feature in place."""
    for message in (r"`torch\.distributed\.\w+` is deprecated", "FSDP2-wrapped module .* returned a view tensor"):
        warnings.filterwarnings("ignore", message=message)


def _settle(trunk: nn.Module, *_: object) -> None:
    """After a forward that no backward follows: give back the root's whole weights, forget the order of the blocks."""
    if not torch.is_grad_enabled():
        assert isinstance(trunk, FSDPModule)
        trunk.reset_iter_state()
