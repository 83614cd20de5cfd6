"""Where a run came from, for RUN/run.json: versions, commit, host, command, date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "polyview",
    "torch",
    "torchvision",
    "timm",
    "open_clip_torch",
    "accelerate",
    "deepspeed",
    "safetensors",
    "simplejpeg",
    "pillow",
    "numpy",
    "faiss-cpu",
    "faiss-gpu",
    "submitit",
)


def provenance(command: Sequence[str] | None = None) -> dict[str, Any]:
    """All of it, as JSON. `command`: the command line, default this process's own."""
    return {
        "command": list(sys.orig_argv if command is None else command),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": _gpus(),
        **slurm_attempt(),
        "versions": versions(),
        "git": git_state(Path(__file__).resolve().parents[2]),
    }


def slurm_attempt() -> dict[str, Any]:
    """{"slurm_job": "42" or an array's "42_7", "slurm_restart": 0}, where Slurm started this."""
    job, array, task = map(os.environ.get, ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"))
    if job is None:
        return {}
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return {"slurm_job": f"{array}_{task}" if array and task else job, "slurm_restart": restart}


def versions() -> dict[str, str]:
    """Python's version and those of the installed packages that can change what a run computes."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(root: Path) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the checkout at `root`; None when it is none (an installed package)."""
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    if not top or not commit or Path(top).resolve() != root.resolve():
        return None  # site-packages inside somebody else's repository is not our commit
    return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain"))}


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")  # not worth importing only to say that there is none
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
