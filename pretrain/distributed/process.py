"""Who this process is among the ranks: read from the launcher's environment, checked against what is wanted.

torchrun, `accelerate launch`, srun through submitit and our own `pretrain.launch` all set RANK, WORLD_SIZE,
LOCAL_RANK and MASTER_ADDR/PORT. What accelerate's configuration asks that we would not do is refused by name.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pretrain.errors import UserError

TIMEOUT = datetime.timedelta(minutes=10)
_LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
"""How gloo and NCCL say that a process at the other end is gone."""


@dataclass(frozen=True)
class Process:
    """One rank."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Rank 0: the one that writes what is written once."""
        return self.rank == 0


def check_world(wanted: int | None) -> None:
    """UserError when the launcher's world is not the one wanted."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted is not None and world != wanted:
        raise UserError(
            f"the recipe needs world {wanted}, but the launcher started {world} process{'es' * (world != 1)}. Use "
            f"`accelerate launch --multi_gpu --num_processes {wanted} -m pretrain …` (also without a GPU: `--cpu` "
            f"starts one process only), or `python -m pretrain …` alone, or set world={world}"
        )


def check_accelerate(precision: str) -> None:
    """UserError for settings of an accelerate config that this run would silently not follow."""
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED")):
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(
                f"the accelerate config asks for {name} (distributed_type), the recipe runs backend ddp; "
                f"use a config of type MULTI_GPU"
            )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        raise UserError(
            f"accelerate asks for mixed_precision {asked}, the recipe for precision {precision}; make them equal"
        )


@contextmanager
def process_group() -> Iterator[Process]:
    """This process in its group (NCCL on GPUs, gloo else); the group is closed at the end.

    Raises:
        UserError: in a collective, because another rank is gone.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        # cuBLAS is reproducible only with a workspace of its own, fixed before its first use
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        yield Process(rank, world, local_rank, device)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _LOST):
            raise
        raise UserError(f"rank {rank} lost another rank, which ended first: its own message says why") from None
    finally:
        if world > 1:
            dist.destroy_process_group()
