"""What the trainer adds around the step: our loop beside a bare DDP loop, on two gloo ranks.

Both train the same trunk on the same decoded batches with the same loss and AdamW. The bare loop is what one would
write by hand: forward, loss, backward, step. Ours is the trainer's own sequence: two stages, joint gradient norm,
check for NaN, shared flags, the clock, and a log line every tenth step. Rounds alternate in one process; the figure
is the median over rounds of CPU seconds a step on rank 0. Bar: at most 2 % more.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import parser, report
from pretrain.distributed.flags import SharedFlags
from pretrain.distributed.process import Process
from pretrain.models.trunk import build_trunk
from pretrain.objectives.clip import Clip
from pretrain.objectives.functional import clip_loss
from pretrain.optim.build import build_optimizer
from pretrain.optim.schedule import Rates
from pretrain.parts import assemble
from pretrain.reader import Batch
from pretrain.recipe import parse_recipe
from pretrain.step import update
from pretrain.telemetry import RunLog
from tests.ranks import run_ranks

STEPS = 10
RECIPE = {
    "name": "bench",
    "output": "run",
    "steps": 1000,
    "global_batch": 64,
    "data": {"sources": ["none"]},
    "model": {
        "image": "vit_tiny_patch16_224",
        "image_size": 96,
        "image_kwargs": {"depth": 6},
        "text": {"width": 192, "layers": 4, "heads": 3, "context": 32},
        "embed_dim": 192,
    },
}


def batch(rank: int) -> Batch:
    g = torch.Generator().manual_seed(rank)
    tokens = torch.zeros(32, 32, dtype=torch.int64)
    tokens[:, :16] = torch.randint(1, 49000, (32, 16), generator=g)
    tokens[:, 16] = 49407
    ids = torch.arange(32) + 32 * rank
    return Batch(
        step=0, ids=ids, source=torch.zeros_like(ids), epoch=torch.zeros_like(ids), keys=[""] * 32,
        weight=torch.ones(32), images={"clip": torch.randint(0, 256, (32, 3, 96, 96), dtype=torch.uint8, generator=g)},
        tokens={"caption": tokens}, captions={"caption": [""] * 32}, labels=torch.full((32,), -1),
    )  # fmt: skip


def both(rank: int, world: int, rounds: int, folder: str) -> dict[str, list[float]]:
    """CPU seconds a step of either loop, round by round."""
    loops = {"ours": _ours(rank, world, Path(folder)), "bare": _bare(rank)}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop()
    for i in range(rounds):
        for name in ("ours", "bare") if i % 2 else ("bare", "ours"):
            start = time.process_time()
            loops[name]()
            seconds[name].append((time.process_time() - start) / STEPS)
    return seconds


def _bare(rank: int):
    recipe = parse_recipe(RECIPE, "bench")
    trunk = DistributedDataParallel(
        build_trunk(recipe.model, seed=0), broadcast_buffers=False, gradient_as_bucket_view=True
    )
    scale = torch.nn.Parameter(torch.tensor([2.659]))
    optimizer = build_optimizer({**dict(trunk.named_parameters()), "scale": scale}, recipe.optimizer)
    data, image, text = batch(rank), Clip.image, Clip.text
    inputs = {image: data.images["clip"], text: data.tokens["caption"]}

    def loop() -> None:
        for _ in range(STEPS):
            features = trunk(inputs)
            loss = clip_loss(F.normalize(features[image], dim=-1), F.normalize(features[text], dim=-1), scale)
            loss.backward()
            torch.distributed.all_reduce(scale.grad)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return loop


def _ours(rank: int, world: int, folder: Path):
    recipe, process = parse_recipe(RECIPE, "bench"), Process(rank, world, 0, torch.device("cpu"))
    parts = assemble(recipe, samples=64, process=process)
    log = RunLog(folder, total_steps=1000, rank=rank, tensorboard=False)
    flags, data = SharedFlags(("stop",), world), batch(rank)
    rates = Rates(lr=1e-4, weight_decay=recipe.optimizer.weight_decay)

    def loop() -> None:
        for i in range(STEPS):
            parts.joint.before_step(i)
            result = parts.two_stage(data)
            grad_norm = update(
                parts.backend, parts.replicated, parts.joint, result, step=i, rates=rates, clip_norm=None
            )
            if i == STEPS - 1:
                line = {"loss": result.loss, **result.figures, "lr": rates.lr, "grad_norm": grad_norm}
                log.step(i + 1, line)
            flags.exchange(set())

    return loop


def main() -> int:
    args = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = run_ranks(both, 2, args.rounds * 2, folder)[0]
    ours, bare = (statistics.median(seconds[name]) for name in ("ours", "bare"))
    ratio = statistics.median(o / b for o, b in zip(seconds["ours"], seconds["bare"]))
    report(
        "CPU seconds a step on rank 0 of two, ViT-Ti/16 at 96 px, batch 64",
        [{"ours_s": ours, "bare_ddp_s": bare, "ratio": ratio, "bar": "<= 1.02"}],
        args,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
