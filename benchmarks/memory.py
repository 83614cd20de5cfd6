"""What a rank truly holds of a 300 M-parameter tower under each backend, beside the formula and our estimate.

    python -m benchmarks.memory --backend fsdp2 --world 1 2 4

A ViT-L/16 (303 M parameters) goes through one step with AdamW on gloo, then forward and backward again. "held" is all
that then lives on a rank: the storages of every tensor of the process, each once, weights, gradients, both moments and
the engine's own buffers. "formula" is 16 bytes a parameter, each 4 over the ranks where the backend spreads it.
"estimate" is what `polyview check` says of the same. Peaks are of resident memory, above that of the process before it
built anything: while it was built (each rank starts from whole weights), and in the steps after.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import parser, report

MIB = 2**20
TOWER = {"image": "vit_large_patch16_224", "text": None, "embed_dim": None}
WORLDS = {"ddp": (1, 2), "zero1": (1, 2), "zero2": (1, 2), "zero3": (1, 2, 4), "fsdp2": (1, 2, 4)}


def one_rank(backend: str, out: Path) -> None:
    """Two steps of this rank; its figures into a file."""
    import torch

    from pretrain.backends import build_backend
    from pretrain.distributed.process import process_group
    from pretrain.models.request import FeatureRequest
    from pretrain.models.trunk import build_trunk
    from pretrain.optim.schedule import Rates

    recipe = _recipe(backend)
    with process_group() as process:
        before = _resident("VmRSS")
        engine = build_backend(build_trunk(recipe.model, seed=0), recipe, process)
        _free()
        figures = {"peak building": _resident("VmHWM") - before}
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        inputs: dict[Any, Any] = {FeatureRequest("image", "a", "pooled"): torch.zeros(1, 3, 224, 224).byte()}
        for last in (False, True):
            (feature,) = engine.forward(inputs).values()
            engine.backward([feature], [torch.ones_like(feature)])
            if not last:
                engine.step(Rates(1e-4, 0.1))
        del feature
        _free()
        figures |= {"held": _held(), "peak stepping": _resident("VmHWM") - before}
        (out / f"{process.rank}.json").write_text(json.dumps(figures | {"engine": engine.describe()}))


def _recipe(backend: str) -> Any:
    from pretrain.recipe import parse_recipe

    data = {"name": "memory", "output": "none", "steps": 1, "global_batch": 4, "backend": backend, "model": TOWER}
    return parse_recipe(data | {"data": {"sources": ["none"]}}, "benchmark")


def _held() -> int:
    """Bytes of the storages of all tensors that are alive, gradients too."""
    import torch

    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in local)}.values())


def _free() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def formula(backend: str, parameters: int, world: int) -> float:
    """16 bytes a parameter: weight, gradient, two moments; each over the ranks where it is spread (ZeRO, Rajbhandari et
    al. 2020, §5, in fp32)."""
    from pretrain.check.sharding import SPREAD

    bytes_of = {"weights": 4, "gradients": 4, "optimizer": 8}
    return sum(parameters * n / (world if backend in SPREAD[kind] else 1) for kind, n in bytes_of.items())


def row(backend: str, world: int) -> dict[str, Any]:
    """The largest figures of all ranks, beside what was expected."""
    import torch

    from pretrain.check import sharding
    from pretrain.models.trunk import build_trunk
    from pretrain.objectives.joint import Joint

    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "benchmarks.memory", "--ranks", str(world), backend, out]
        subprocess.run(command, check=True)  # ranks are forked from a process of their own, which trains nothing
        ranks = [json.loads(path.read_text()) for path in Path(out).glob("*.json")]
    recipe = _recipe(backend)
    with torch.device("meta"):
        trunk = build_trunk(recipe.model, seed=0)
    parameters = sum(p.numel() for p in trunk.parameters())
    estimate = sharding.state(recipe, trunk, Joint({}), False, world=world, host=True)
    most = {name: max(rank[name] for rank in ranks) / MIB for name in ("held", "peak building", "peak stepping")}
    wanted = formula(backend, parameters, world) / MIB
    return {
        "backend": backend,
        "world": world,
        "held MiB": most["held"],
        "formula MiB": wanted,
        "held / formula": most["held"] / wanted,
        "estimate MiB": (sum(estimate.values()) - estimate["gathered"]) / MIB,
        "peak building MiB": most["peak building"],
        "peak stepping MiB": most["peak stepping"],
        "estimate + gathered MiB": sum(estimate.values()) / MIB,
        "engine": ranks[0]["engine"],
    }


def main() -> None:
    p = parser(__doc__ or "", rounds=False)
    p.add_argument("--backend", nargs="*", default=list(WORLDS), choices=list(WORLDS))
    p.add_argument("--world", nargs="*", type=int, help="default: 1 2 and, where weights are spread, 4")
    p.add_argument("--ranks", nargs=3, metavar=("WORLD", "BACKEND", "OUT"), help="be the ranks of it")
    args = p.parse_args()
    if args.ranks:
        from pretrain.launch import run_world

        world, backend, out = args.ranks
        sys.exit(run_world(int(world), one_rank, backend, Path(out)))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows: list[dict[str, Any]] = []
    for backend, world in ((b, w) for b in args.backend for w in args.world or WORLDS[b]):
        rows.append(row(backend, world))
        report("memory of a rank, ViT-L/16, AdamW, fp32", rows, args)  # each time: a world takes minutes


if __name__ == "__main__":
    main()
