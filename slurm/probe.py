"""What a rank of a job finds on its node: `python -m slurm.probe FOLDER`, started by srun, prints a line of JSON.

It does what training does first: ranks find each other by the same variables and reduce a number, files of one are read
by the others. FOLDER is where the job was sent from; whether it is the same everywhere is among what is tried.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGES = ("polyview", "torch", "submitit")
MEET_S = 120
"""Until all ranks have met."""
SEEN_S = 30
"""Until a file that one node wrote is seen on another: network file systems keep what they know for a while."""
ONLINE = ("huggingface.co", 443)
HEADER = "polyview-probe "
"""Begins the line; launchers and modules print theirs beside it."""


def main() -> int:
    folder = Path(sys.argv[1])
    print(HEADER + json.dumps(report(folder)), flush=True)
    return 0


def report(folder: Path) -> dict[str, Any]:
    """All of it; what fails is told in words, and what stands on it left out."""
    import torch

    import polyview
    from pretrain.cli_doctor import problems, version

    found: dict[str, Any] = {
        "rank": int(os.environ.get("SLURM_PROCID", "0")),
        "host": platform.node(),
        "python": platform.python_version(),
        "code": str(Path(polyview.__file__).parent),
        **{package: version(package) for package in PACKAGES},
        "cores": len(os.sched_getaffinity(0)),
        "gpus": torch.cuda.device_count(),
        "scontrol": _scontrol(),
        "online": _online(),
        "offline": os.environ.get("HF_HUB_OFFLINE") == "1",
        "problems": [problem._asdict() for problem in problems()],
    }
    try:
        return found | _together(folder)
    except Exception as error:  # whatever torch, the network or the file system raises: the report tells of it
        return found | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def _together(folder: Path) -> dict[str, Any]:
    """What the ranks try with each other."""
    import submitit
    import torch
    import torch.distributed as dist

    from slurm.train_job import meeting

    os.environ.setdefault("SUBMITIT_EXECUTOR", "slurm")
    os.environ.update(meeting(submitit.JobEnvironment()))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=MEET_S))
    try:
        ones = torch.ones(1)
        dist.all_reduce(ones)
        found: dict[str, Any] = {"met": int(ones.item()) == world}
        dist.barrier()
        found["clock"] = time.time()  # all within the time that a barrier takes
        found |= _files(folder, rank, world)
        if torch.cuda.is_available():
            found["nccl"] = _nccl(int(os.environ["LOCAL_RANK"]), world)
        return found
    finally:
        dist.destroy_process_group()


def _files(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Whether each rank's file is seen by this one, and whether a lock of rank 0 holds on all nodes."""
    import torch.distributed as dist

    told: list[Any] = [None]
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank_{rank}").write_text(str(rank))
    lock = None
    if rank == 0:
        with suppress(OSError):
            lock = open(folder / "LOCK", "w")  # noqa: SIM115 - held until all have tried
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            told = [True]
    dist.broadcast_object_list(told, src=0)
    seen = _seen(folder, world)
    locked = _is_locked(folder / "LOCK") if rank and seen == world else None
    dist.barrier()
    if lock is not None:
        lock.close()
    return {"seen": seen, "locked": locked if told[0] else False}


def _seen(folder: Path, world: int) -> int:
    """Ranks whose files are here."""
    patience = time.monotonic() + SEEN_S
    while True:
        seen = sum((folder / f"rank_{rank}").is_file() for rank in range(world))
        if seen == world or time.monotonic() > patience:
            return seen
        with suppress(OSError):
            os.listdir(folder)  # has a network file system look again
        time.sleep(0.5)


def _is_locked(file: Path) -> bool:
    with open(file, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _nccl(local_rank: int, world: int) -> bool | str:
    """Whether GPUs reduce a number over all ranks; what NCCL says where not."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    try:
        group: Any = dist.new_group(backend="nccl", timeout=datetime.timedelta(seconds=MEET_S))
        ones = torch.ones(1, device=device)
        dist.all_reduce(ones, group=group)
        return int(ones.item()) == world
    except RuntimeError as error:
        return str(error).splitlines()[0]


def _scontrol() -> bool:
    """Whether a job can put itself back into the queue from this node."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("scontrol") is None:
        return False
    try:
        return subprocess.run(["scontrol", "show", "job", job], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _online() -> bool:
    """Whether there is a way out."""
    try:
        socket.create_connection(ONLINE, timeout=3).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
