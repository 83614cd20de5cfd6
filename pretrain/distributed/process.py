"""Who this process is among the ranks: read from the launcher's environment, checked against what is wanted.

torchrun, `accelerate launch`, srun through submitit and our own `pretrain.launch` all set RANK, WORLD_SIZE,
LOCAL_RANK and MASTER_ADDR/PORT.
"""

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pretrain.distributed.failures import crashed, explained
from pretrain.errors import UserError
from pretrain.exit_codes import LOST

STARTING = 4
"""Times `faults.hang_s` that a start and its first step may take: they load, verify, compile."""
TIMEOUT_S = 600.0
"""Until all ranks have met; of a collective, where no watchdog watches."""
STORE_S = 10.0
"""Until it is known which rank was the first to crash."""


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


def ensure_group(process: Process) -> None:
    """A group of this process alone where it is the only one: sharding engines want one at any world."""
    if process.world == 1 and not dist.is_initialized():
        backend = "nccl" if process.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@contextmanager
def process_group(hang_s: float | None = None) -> Iterator[Process]:
    """This process in its group (NCCL on GPUs, gloo else); the group is closed at the end.

    hang_s: seconds after which a watchdog ends a rank that stands still; collectives wait longer, since it says more.

    Raises:
        UserError: for every error within. Another rank is gone, or a GPU, the network or a collective failed in a way
            that is known; or it crashed: the first of the ranks that do tells the traceback.
    """
    # newer torch renames its collectives, older knows only these names
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    before = os.environ.get("LOCAL_RANK")
    local_rank = int(before or "0")
    device = torch.device("cpu")
    store: dist.Store | None = None
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed reads it, at any world
    try:
        if torch.cuda.is_available():
            device = torch.device("cuda", local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
            # cuBLAS is reproducible only with a workspace of its own, fixed before its first use
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if world > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            meeting = datetime.timedelta(seconds=TIMEOUT_S)
            store, rank, world = next(dist.rendezvous("env://", rank, world, timeout=meeting))
            timeout = meeting + datetime.timedelta(seconds=(hang_s or 0) * STARTING)
            store.set_timeout(timeout)
            store = dist.PrefixStore("default_pg", store)  # as torch does itself
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        yield Process(rank, world, local_rank, device)
    except UserError as error:
        error.told_already = not _is_first(store, str(error))
        raise
    except Exception as error:
        told = explained(error, rank, str(device)) if isinstance(error, RuntimeError) else None
        if told is None:
            raise crashed(error, rank, whole=_is_first(store, "crashed")) from error
        told.told_already = told.exit_code == LOST and not _is_first(store, "lost")
        raise told from error
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        if dist.is_initialized():
            dist.destroy_process_group()


def _is_first(store: dist.Store | None, what: str) -> bool:
    """Whether no other rank has come to tell of the same before."""
    if store is None:
        return True
    try:
        store.set_timeout(datetime.timedelta(seconds=STORE_S))
        return store.add(f"told: {what}", 1) == 1
    except RuntimeError:  # the rank that holds the store is gone, and told why
        return False
