"""Run a function on several real ranks: one process each, gloo, one thread a rank."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# forks from a server that has the heavy imports behind it, but has started no thread and no group
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pretrain.train", "pretrain.backends.ddp", "pretrain.backends.fsdp2"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _entry(rank: int, fn: Callable, world: int, port: int, out: str, args: tuple) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        torch.save(fn(rank, world, *args), Path(out) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_ranks(fn: Callable, world: int, *args) -> list:
    """Call ``fn(rank, world, *args)`` on `world` gloo ranks; the list of what each returned (tensors, plain data).

    `fn` must be importable (a top-level function). An exception on any rank is raised here.
    """
    with tempfile.TemporaryDirectory() as out:
        mp.start_processes(_entry, (fn, world, free_port(), out, args), nprocs=world, start_method="forkserver")
        return [torch.load(Path(out) / f"{r}.pt", weights_only=True) for r in range(world)]
