"""What this machine offers and what is wrong with its set-up: versions, cores, GPUs, faiss, disk."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import sys

FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu12")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    facts, problems = _facts(), _problems()
    if args.json:
        print(json.dumps({"facts": facts, "problems": problems}, indent=1))
    else:
        for name, value in facts.items():
            print(f"{name:14} {value}")
        for problem in problems:
            print(f"PROBLEM: {problem}")
        print("nothing is wrong" if not problems else f"{len(problems)} problem(s)")
    return 1 if problems else 0


def _facts() -> dict[str, object]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = ("polyview", "torch", "torchvision", "timm", "accelerate", "webdataset", *FAISS)
    return {
        "python": sys.version.split()[0],
        **{p: v for p in packages if (v := _version(p))},
        "cores": len(os.sched_getaffinity(0)),
        "threads": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}",
        "gpus": ", ".join(gpus) or "none",
        "bf16": "yes" if not gpus or torch.cuda.is_bf16_supported() else "no",
        "free disk": f"{shutil.disk_usage('.').free / 2**30:.0f} GiB here",
        "slurm": shutil.which("sbatch") or "not on this machine",
    }


def _problems() -> list[str]:
    import torch

    found = [p for p in FAISS if _version(p)]
    problems = []
    if not found:
        problems.append("no faiss: pip install 'polyview[cpu]' or 'polyview[gpu]'")
    if len(found) > 1:
        problems.append(
            f"{' and '.join(found)} are both installed and share a folder; which one runs is chance: "
            f"pip uninstall {' '.join(found)}, then install one"
        )
    if torch.cuda.is_available() and found == ["faiss-cpu"]:
        problems.append("there is a GPU, but faiss-cpu is installed: pip uninstall faiss-cpu, then 'polyview[gpu]'")
    if shutil.disk_usage(".").free < 5 * 2**30:
        problems.append("less than 5 GiB free here: checkpoints may not fit")
    return problems


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
