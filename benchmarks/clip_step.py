"""A CLIP step beside open_clip's: forward, loss, backward, AdamW; same weights, same batch.

    POLYVIEW_DATA=… python -m benchmarks.clip_step [--model ViT-B-32] [--batch 16] [--device cpu] [--json PATH]
    POLYVIEW_DATA=… python -m benchmarks.clip_step --model ViT-B-16 --batch 512 --device cuda --rounds 20

Bar: at least 1.3 times faster on one CPU thread in float32, 1.2 on a GPU under bf16 autocast. The batch is
real photographs with their captions (flickr1k; repeated where the batch is larger). The peer is open_clip's model and
loss with its full context of 77, its parameter groups and torch's fused AdamW (its own choice, the unfused one, is
slower on a CPU); its images come normalised, ours are normalised within the step. On a GPU it is also given
torch.compile, its `--torchcompile`, and memory and model FLOP utilisation are shown. Both losses are compared before
any measurement.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import clock, measure, parser, report
from pretrain.distributed.groups import LOCAL
from pretrain.errors import UserError
from pretrain.models.request import FeatureRequest
from pretrain.models.trunk import build_trunk
from pretrain.objectives.functional import clip_loss
from pretrain.optim.build import build_optimizer
from pretrain.recipe import OptimizerRecipe
from pretrain.views.decode import decode
from pretrain.views.geometry import eval_crop
from pretrain.views.tokenizer import ClipTokenizer
from pretrain.weights.open_clip import load_open_clip, model_recipe

MODELS = ("ViT-B-32", "ViT-B-16")
BARS = {"cpu": 1.3, "cuda": 1.2}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s, dense bf16, as the vendor states them (SXM)
IMAGE, CAPTION = FeatureRequest("image", "crop"), FeatureRequest("text", "caption")


def real_batch(n: int, device: str) -> tuple[Tensor, Tensor]:
    """n photographs (n, 3, 224, 224) uint8 and the tokens (n, 77) of a caption each."""
    if not os.environ.get("POLYVIEW_DATA"):
        raise UserError("POLYVIEW_DATA must name the folder that holds flickr1k")
    folder = Path(os.environ["POLYVIEW_DATA"]) / "flickr1k"
    with open(folder / "captions.tsv", newline="") as lines:
        pairs = {row["image"]: row["caption"] for row in csv.DictReader(lines, delimiter="\t")}
    chosen = dict(islice(pairs.items(), n))
    images = [eval_crop(decode((folder / "images" / name).read_bytes()), 224) for name in chosen]
    rows = torch.arange(n) % len(chosen)
    return torch.stack(images)[rows].to(device), ClipTokenizer()(list(chosen.values()))[rows].to(device)


def peer_model(name: str, device: str) -> nn.Module:
    import open_clip

    logging.disable(logging.WARNING)  # "initialized randomly" is what is wanted
    torch.manual_seed(0)
    return open_clip.create_model(name, pretrained=None).to(device)


def peer_step(model: nn.Module, images: Tensor, tokens: Tensor, compiled: bool = False) -> Callable[[], Tensor]:
    """open_clip's step: its ClipLoss and its weight-decay groups (open_clip 3.3, main.py)."""
    from open_clip.loss import ClipLoss

    recipe = model_recipe(MODELS[0])
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (recipe.mean, recipe.std))
    pixels, loss_of = (images.float() / 255 - mean) / std, ClipLoss()
    named = list(model.named_parameters())
    bare = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    decayed = [p for _, p in named if all(p is not b for b in bare)]
    groups = [{"params": bare, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.98), eps=1e-6, fused=True)
    forward = torch.compile(model) if compiled else model

    def step() -> Tensor:
        optimizer.zero_grad()
        with autocast(images.device):
            loss = loss_of(*forward(pixels, tokens))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def our_step(name: str, peer: nn.Module, images: Tensor, tokens: Tensor) -> Callable[[], Tensor]:
    """Our trunk with the peer's weights, our loss."""
    trunk = build_trunk(model_recipe(name), seed=0)
    scale = load_open_clip(trunk, peer.state_dict())
    if scale is None:
        raise UserError("open_clip's model has no logit_scale")
    trunk.to(images.device)
    logit_scale = nn.Parameter(scale.to(images.device))
    recipe = OptimizerRecipe(lr=1e-6, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    optimizer = build_optimizer({**dict(trunk.named_parameters()), "logit_scale": logit_scale}, recipe)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(images.device):
            found = trunk({IMAGE: images, CAPTION: tokens})
        image, text = (nn.functional.normalize(found[r].float(), dim=-1) for r in (IMAGE, CAPTION))
        loss = clip_loss(image, text, logit_scale, group=LOCAL)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def build_steps(args: argparse.Namespace, images: Tensor, tokens: Tensor) -> dict[str, Callable[[], Tensor]]:
    peer = peer_model(args.model, args.device)
    steps = {"ours": our_step(args.model, peer, images, tokens), "open_clip": peer_step(peer, images, tokens)}
    first, second = steps["ours"]().item(), steps["open_clip"]().item()
    if abs(first - second) > (1e-4 if args.device == "cpu" else 2e-2):
        raise UserError(f"the two losses differ before the first step: {first} and {second}")
    if args.device == "cuda":
        steps["open_clip, compiled"] = peer_step(peer, images, tokens, compiled=True)
    return steps


def on_a_gpu(step: Callable[[], Tensor], seconds: float) -> dict[str, float | str]:
    """Peak memory of a step, and its FLOPs as a share of what the GPU could have done in that time."""
    torch.cuda.reset_peak_memory_stats()
    with FlopCounterMode(display=False) as counter:
        step()
    name = torch.cuda.get_device_name()
    peak = next((flops for gpu, flops in PEAKS.items() if gpu in name), None)
    utilisation = counter.get_total_flops() / seconds / peak if peak else "unknown peak"
    return {"MFU": utilisation, "GiB": torch.cuda.max_memory_allocated() / 2**30, "GPU": name}


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--model", choices=MODELS, default=MODELS[0])
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--device", choices=list(BARS), default="cpu")
    p.set_defaults(rounds=3)
    args = p.parse_args()
    torch.set_num_threads(1)
    images, tokens = real_batch(args.batch, args.device)
    steps = build_steps(args, images, tokens)
    seconds = measure(steps, args.rounds, clock(args.device))
    ours = seconds["ours"]
    rows = [
        {
            "step": name,
            "seconds": s,
            "samples/s": args.batch / s,
            "ours is faster by": s / ours,
            "bar": "" if name == "ours" else BARS[args.device],
            **(on_a_gpu(steps["ours" if name == "ours" else "open_clip"], s) if args.device == "cuda" else {}),
        }
        for name, s in seconds.items()
    ]
    lengths = tokens.argmax(dim=-1) + 1
    captions = f"captions of {lengths.float().mean():.1f} tokens, longest {lengths.max()}"
    report(f"{args.model} step, batch {args.batch}, {args.device}; {captions}", rows, args)


if __name__ == "__main__":
    main()
