"""The contrastive loss beside open_clip's: CPU seconds of forward and backward, bytes kept in between.

    python -m benchmarks.contrastive_loss [--rounds 5] [--scale 14.3] [--json PATH]
    python -m benchmarks.contrastive_loss --device cuda --sizes 32768 65536

Bar: at N = 8,192 and D = 512, one thread, float32, at least 1.5 times faster, and bytes that double with N
(the dense loss: quadruple); on a GPU, where seconds are wall time, not slower at 32,768. Bytes are those of the tensors
that autograd is asked to keep, each storage once. The peer's are counted on meta tensors, because at 2N its matrices
take gigabytes.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.common import clock, measure, parser, report
from pretrain.distributed.groups import LOCAL
from pretrain.objectives.functional import clip_loss

BAR = 1.5


def ours(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    return clip_loss(image, text, logit_scale, group=LOCAL)


def peer(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    from open_clip.loss import ClipLoss

    return ClipLoss()(image, text, logit_scale.exp())


def features(n: int, d: int, scale: float, device: str = "cpu") -> list[Tensor]:
    """Two (n, d) leaves of unit rows, and the log of the scale."""
    generator = torch.Generator().manual_seed(0)
    rows = [normalize(torch.randn(n, d, generator=generator), dim=1) for _ in range(2)]
    leaves = [*rows, torch.tensor([math.log(scale)])]
    return [leaf.to(device).requires_grad_() for leaf in leaves]


def step(loss, leaves: list[Tensor]) -> None:
    torch.autograd.grad(loss(*leaves), leaves)


def kept_bytes(loss, leaves: list[Tensor]) -> int:
    """Bytes kept for the backward, each storage counted once."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss(*leaves)
    return sum(storage.nbytes() for storage in kept.values())


def seconds_of(loss, leaves: list[Tensor], rounds: int, device: str) -> float:
    """Infinite where the device has not the memory."""
    try:
        return measure({"": lambda: step(loss, leaves)}, rounds, clock(device))[""]
    except torch.OutOfMemoryError:
        return math.inf


def compare(n: int, d: int, scale: float, rounds: int, device: str) -> dict:
    leaves = features(n, d, scale, device)
    if device == "cpu":
        seconds = measure({"ours": lambda: step(ours, leaves), "open_clip": lambda: step(peer, leaves)}, rounds)
    else:
        seconds = {name: seconds_of(of, leaves, rounds, device) for name, of in (("ours", ours), ("open_clip", peer))}
    row = {"N": n, "scale": scale, "ours s": seconds["ours"], "open_clip s": seconds["open_clip"]}
    row |= {"ratio": seconds["open_clip"] / seconds["ours"], "bar": BAR if device == "cpu" else 1.0}
    for name, loss, device in (("ours", ours, "cpu"), ("open_clip", peer, "meta")):
        for factor, label in ((1, "N"), (2, "2N")):
            kept = kept_bytes(loss, features(factor * n, d, scale, device))
            row[f"{name} MiB at {label}"] = kept / 2**20
    return row


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows = [compare(n, args.dim, args.scale, args.rounds, args.device) for n in args.sizes]
    where = "one thread" if args.device == "cpu" else torch.cuda.get_device_name()
    report(f"contrastive loss, D = {args.dim}, float32, {where}, forward and backward", rows, args)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--dim", type=int, default=512, help="D, the features' width")
    arguments.add_argument("--sizes", type=int, nargs="+", default=[2048, 8192], metavar="N")
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments.add_argument("--scale", type=float, default=14.3, help="the factor on the cosine; training ends at 100")
    main(arguments.parse_args())
