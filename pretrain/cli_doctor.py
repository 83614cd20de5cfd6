"""What this machine offers and what is wrong with its set-up: versions, cores, GPUs, faiss, disk."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu12")
LEAST_GIB = 5
LEAST_INODES = 100_000
"""A checkpoint is a few files a rank; unpacked data sets are what needs many."""


class Problem(NamedTuple):
    """Something that is wrong."""

    what: str
    why: str
    """Why it matters."""
    do: str
    """What to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    return tell(facts(), problems(), as_json=args.json)


def tell(facts: Mapping[str, object], problems: Sequence[Problem], *, as_json: bool) -> int:
    """Print what was found; the exit code."""
    if as_json:
        print(json.dumps({"facts": facts, "problems": [problem._asdict() for problem in problems]}, indent=1))
        return 1 if problems else 0
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}} {value}")
    for problem in problems:
        print(f"PROBLEM: {problem.what}\n  why: {problem.why}\n  do:  {problem.do}")
    print("nothing is wrong" if not problems else f"{len(problems)} problem{'s' * (len(problems) > 1)}")
    return 1 if problems else 0


def facts() -> dict[str, object]:
    """What is here, by name."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = ("polyview", "torch", "torchvision", "timm", "accelerate", "webdataset", *FAISS)
    return {
        "python": sys.version.split()[0],
        **{p: v for p in packages if (v := version(p))},
        "cores": len(os.sched_getaffinity(0)),
        "threads": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}",
        "gpus": ", ".join(gpus) or "none",
        "bf16": "yes" if not gpus or torch.cuda.is_bf16_supported() else "no",
        "free disk": f"{shutil.disk_usage('.').free / 2**30:.0f} GiB here",
        "slurm": shutil.which("sbatch") or "not on this machine",
    }


def problems() -> list[Problem]:
    """What is wrong here."""
    import torch

    return [*_faiss(torch.cuda.is_available()), *disk(Path())]


def disk(folder: Path) -> list[Problem]:
    """What is wrong with the room in `folder`."""
    room = os.statvfs(folder)
    found = []
    if room.f_bavail * room.f_frsize < LEAST_GIB * 2**30:
        what = f"{room.f_bavail * room.f_frsize / 2**30:.1f} GiB are free in {folder.absolute()}"
        found.append(Problem(what, "checkpoints may not fit", "make room, or send them elsewhere: checkpoint.to"))
    if room.f_files and room.f_favail < LEAST_INODES:  # some file systems count none
        what = f"{room.f_favail:,} more files are possible in {folder.absolute()}"
        found.append(Problem(what, "a disk may have room and still refuse files", "remove files, or use another disk"))
    return found


def version(package: str) -> str | None:
    """Of an installed package; None: it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _faiss(gpu: bool) -> list[Problem]:
    found = [p for p in FAISS if version(p)]
    if not found:
        why = "an index is built and searched with it"
        return [Problem("no faiss is installed", why, "pip install 'polyview[cpu]' or 'polyview[gpu]'")]
    if len(found) > 1:
        why, do = "they share a folder, and which one runs is chance", f"pip uninstall {' '.join(found)}; install one"
        return [Problem(f"{' and '.join(found)} are both installed", why, do)]
    if gpu and found == ["faiss-cpu"]:
        do = "pip uninstall faiss-cpu; pip install 'polyview[gpu]'"
        return [Problem("there is a GPU, but faiss-cpu is installed", "searches run on the CPU", do)]
    return []
