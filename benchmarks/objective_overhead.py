"""What an objective adds to the towers: its whole step beside the bare forward and backward of what it asks for.

    python -m benchmarks.objective_overhead [--model resnet18] [--batch 8] [--rounds 3] [--json PATH]

Bare: the trunk on the same crops in the same groups, a sum as loss, its backward; the teacher's forward where there
is one. Ours: the trainer's two stages with heads, assignments, queues, loss and signals; no optimizer in either.
Crops of 224 and 96 pixels, published sizes of heads and queues. Bar: at most 10 % more CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import measure, parser, report
from pretrain.distributed.process import Process
from pretrain.parts import Parts, assemble
from pretrain.reader import Batch
from pretrain.recipe import parse_recipe

OBJECTIVES: dict[str, dict[str, Any]] = {
    "swav": {"swav": {"freeze_steps": 0}},
    "swav with a queue of 3,840": {"swav": {"freeze_steps": 0, "queue": 3840}},
    "hydra": {"hydra": {"classes": 1000}},
    "moco": {"moco": {}},
    "dino": {"dino": {"freeze_steps": 0}},
    "clip and swav": {"clip": 1.0, "swav": {"freeze_steps": 0, "weight": 0.5}},
}


def parts_of(model: str, batch: int, objectives: dict[str, Any]) -> Parts:
    text = {"width": 128, "layers": 4, "heads": 2} if "clip" in objectives else None
    data = {
        "name": "bench", "output": "run", "steps": 1000, "global_batch": batch, "data": {"sources": ["none"]},
        "model": {"image": model, "embed_dim": 512 if text else None, "text": text}, "objectives": objectives,
    }  # fmt: skip
    return assemble(parse_recipe(data, "bench"), samples=batch, process=Process(0, 1, 0, torch.device("cpu")))


def random_batch(parts: Parts, rows: int, step: int) -> Batch:
    g = torch.Generator().manual_seed(0)
    ids = torch.arange(rows)
    tokens = torch.zeros(rows, 77, dtype=torch.int64)
    tokens[:, :12] = torch.randint(1, 400, (rows, 12), generator=g)
    tokens[:, 12] = 49407
    views = parts.joint.image_views(224)
    images = {v.name: torch.randint(0, 256, (rows, 3, v.size, v.size), dtype=torch.uint8, generator=g) for v in views}
    return Batch(
        step, ids, ids * 0, ids * 0, [""] * rows, torch.ones(rows), ids % 4, images, {"caption": tokens}, {},
    )  # fmt: skip


def pair(parts: Parts, batch: Batch) -> dict[str, Callable[[], None]]:
    """The whole step, and the towers alone."""
    inputs = parts.two_stage.inputs(batch)

    def ours() -> None:
        parts.joint.before_step(batch.step)
        parts.two_stage(batch)

    def bare() -> None:
        features = parts.backend.forward(inputs)
        torch.stack([f.sum() for r, f in features.items() if not r.teacher]).sum().backward()

    return {"ours": ours, "bare": bare}


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--model", default="resnet18")
    p.add_argument("--batch", type=int, default=8)
    p.set_defaults(rounds=3)
    args = p.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, objectives in OBJECTIVES.items():
        parts = parts_of(args.model, args.batch, objectives)
        # late enough for a queue to be full: its place holds rows of zeros, which cost what others cost
        batch = random_batch(parts, args.batch, step=1000)
        seconds = measure(pair(parts, batch), args.rounds)
        more = seconds["ours"] / seconds["bare"] - 1
        rows.append({"objective": name, "step_s": seconds["ours"], "towers_s": seconds["bare"], "more": more})
    report(f"step beside the towers alone, {args.model}, batch {args.batch}, cpu; bar: <= 0.10 more", rows, args)


if __name__ == "__main__":
    main()
