"""A SwAV step beside the official grouping and lightly's: forward, loss, backward, LARS; same weights, same crops.

    python -m benchmarks.swav_step [--model resnet50] [--batch 8] [--rounds 3] [--device cpu] [--json PATH]

2 x 224 + 6 x 96 crops, 3,000 prototypes. The peers are torchvision's ResNet-50 with the official order of
operations (`official_swav.py`) and with lightly's head, prototypes, loss and LARS as its own examples call them
(the backbone once a crop). Their crops come normalised, ours are normalised within the step, and ours goes through
the trainer's own two stages. Ours and the official loss are compared before any measurement; lightly's differs
(BatchNorm a crop, prototypes with bias). Bars: at least as fast as the official, 1.2 times lightly.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.clip_step import clock
from benchmarks.common import measure, parser, report
from benchmarks.official_swav import OfficialSwav, step_of
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.optim.schedule import Rates
from pretrain.parts import Parts, assemble
from pretrain.reader import Batch
from pretrain.recipe import parse_recipe
from pretrain.step import update

LR, WEIGHT_DECAY = 1e-3, 1e-6
BARS = {"official": 1.0, "lightly": 1.2}


def our_parts(args: argparse.Namespace) -> Parts:
    recipe = parse_recipe(
        {
            "name": "bench", "output": "run", "steps": 1000, "global_batch": args.batch, "data": {"sources": ["none"]},
            "model": {
                "image": args.model, "embed_dim": None, "text": None, "image_kwargs": {"zero_init_last": False},
                "mean": [0.485, 0.456, 0.406], "std": [0.228, 0.224, 0.225],
            },
            "objectives": {"swav": {"freeze_steps": 0}},
            "optimizer": {"name": "lars", "lr": LR, "weight_decay": WEIGHT_DECAY, "exclude_vectors": False},
        },
        "bench",
    )  # fmt: skip
    return assemble(recipe, samples=args.batch, process=Process(0, 1, 0, torch.device(args.device)))


def random_batch(parts: Parts, rows: int, device: str) -> Batch:
    g = torch.Generator().manual_seed(0)
    views, ids = parts.joint.image_views(224), torch.arange(rows)
    images = {v.name: torch.randint(0, 256, (rows, 3, v.size, v.size), dtype=torch.uint8, generator=g) for v in views}
    return Batch(0, ids, ids * 0, ids * 0, [""] * rows, torch.ones(rows), ids * 0 - 1, images, {}, {}).to(device)


def our_step(parts: Parts, batch: Batch) -> Callable[[], Tensor]:
    def step() -> Tensor:
        parts.joint.before_step(0)
        result = parts.two_stage(batch)
        update(
            parts.backend, parts.replicated, parts.joint, result,
            step=0, rates=Rates(LR, WEIGHT_DECAY), clip_norm=None,
        )  # fmt: skip
        return result.loss

    return step


def peer_backbone(args: argparse.Namespace, parts: Parts) -> nn.Module:
    """torchvision's, with our weights: the names are the same."""
    import torchvision

    backbone = torchvision.models.get_model(args.model)
    backbone.fc = nn.Identity()
    backbone.load_state_dict(parts.backend.trunk.image.backbone.state_dict())
    return backbone.to(args.device)


def official(args: argparse.Namespace, parts: Parts, crops: list[Tensor]) -> Callable[[], Tensor]:
    swav, options = parts.joint.by_name["swav"], parts.joint.by_name["swav"].options
    width = parts.backend.trunk.pooled_dim
    model = OfficialSwav(peer_backbone(args, parts), width, options.hidden, options.dim, options.prototypes)
    model.head.load_state_dict(swav.head.state_dict())
    model.prototypes.weight.data.copy_(swav.prototypes.data)
    return step_of(model.to(args.device), crops, LR, WEIGHT_DECAY)


def lightly(args: argparse.Namespace, parts: Parts, crops: list[Tensor]) -> Callable[[], Tensor]:
    from lightly.loss import SwaVLoss
    from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes
    from lightly.utils.lars import LARS

    backbone, width = peer_backbone(args, parts), parts.backend.trunk.pooled_dim
    head, prototypes = SwaVProjectionHead(width, 2048, 128).to(args.device), SwaVPrototypes(128, 3000).to(args.device)
    loss_of = SwaVLoss()
    parameters = [*backbone.parameters(), *head.parameters(), *prototypes.parameters()]
    optimizer = LARS(parameters, lr=LR, momentum=0.9, weight_decay=WEIGHT_DECAY)

    def step() -> Tensor:
        prototypes.normalize()
        scores = [prototypes(nn.functional.normalize(head(backbone(c).flatten(1)), dim=1)) for c in crops]
        loss = loss_of(scores[:2], scores[2:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--model", default="resnet50")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.set_defaults(rounds=3)
    args = p.parse_args()
    torch.set_num_threads(1)
    parts = our_parts(args)
    batch = random_batch(parts, args.batch, args.device)
    crops = [parts.backend.trunk.image._normalise(x).contiguous() for x in batch.images.values()]
    peers = {"official": official(args, parts, crops), "lightly": lightly(args, parts, crops)}
    steps = {"ours": our_step(parts, batch), **peers}
    first, second = steps["ours"]().item(), steps["official"]().item()
    if abs(first - second) > (1e-3 if args.device == "cpu" else 2e-2):
        raise UserError(f"the two losses differ before the first step: {first} and {second}")
    seconds = measure(steps, args.rounds, clock(args.device))
    rows = [
        {"step": n, "seconds": s, "images/s": args.batch / s, "ours is faster by": s / seconds["ours"],
         "bar": BARS.get(n, "")}
        for n, s in seconds.items()
    ]  # fmt: skip
    report(f"SwAV step, {args.model}, 2x224+6x96, batch {args.batch}, {args.device}", rows, args)


if __name__ == "__main__":
    main()
