"""The sigmoid loss beside open_clip's, dense and in chunks: CPU seconds of forward and backward, bytes kept in between.

    python -m benchmarks.siglip_loss [--rounds 5] [--scale 10] [--bias -10] [--json PATH]

Bar: at D = 512, one thread, float32, bytes kept at most 1.5 times the features', and a step no slower than open_clip's
dense loss. Bytes are those of the tensors that autograd is asked to keep, each storage once; the peer's are counted on
meta tensors. `dense` is open_clip's class. Its releases up to 3.3 have no chunks, so `chunked` is written here, by the
identity that its later `chunk_size` stands on: softplus of all scores, 256 images at a time, less the pairs' scores.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import measure, parser, report
from benchmarks.contrastive_loss import features, kept_bytes, step
from pretrain.distributed.groups import LOCAL
from pretrain.objectives.functional import siglip_loss

BAR = 1.5
CHUNK = 256


def ours(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    return siglip_loss(image, text, logit_scale, logit_bias, group=LOCAL)


def dense(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    from open_clip.loss import SigLipLoss

    return SigLipLoss()(image, text, logit_scale.exp(), logit_bias)


def chunked(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    scale, total = logit_scale.exp(), image.new_zeros(())
    for rows in image.split(CHUNK):
        total = total + F.softplus(scale * rows @ text.T + logit_bias).sum()
    pairs = scale * (image * text).sum(dim=1) + logit_bias
    return (total - pairs.sum()) / len(image)


LOSSES = {"ours": ours, "open_clip": dense, "chunked": chunked}


def compare(n: int, args: argparse.Namespace) -> dict:
    leaves = _leaves(n, args)
    seconds = measure({name: lambda f=f: step(f, leaves) for name, f in LOSSES.items()}, args.rounds)
    row = {"N": n, **{f"{name} s": s for name, s in seconds.items()}}
    row["ratio"] = seconds["open_clip"] / seconds["ours"]
    features_mib = 2 * n * args.dim * 4 / 2**20
    row |= {"bar": 1.0, "features MiB": features_mib}
    for name, loss in LOSSES.items():
        kept = kept_bytes(loss, _leaves(n, args, "cpu" if name == "ours" else "meta")) / 2**20
        row |= {f"{name} MiB": kept, f"{name} / features": kept / features_mib}
    return row | {"bar of ours / features": BAR}


def _leaves(n: int, args: argparse.Namespace, device: str = "cpu") -> list[Tensor]:
    bias = torch.tensor([args.bias], device=device, requires_grad=True)
    return [*features(n, args.dim, args.scale, device), bias]


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    title = f"sigmoid loss, D = {args.dim}, float32, one thread, forward and backward"
    report(title, [compare(n, args) for n in (2048, 8192)], args)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--dim", type=int, default=512, help="D, the features' width")
    arguments.add_argument("--scale", type=float, default=10.0, help="the factor on the cosine")
    arguments.add_argument("--bias", type=float, default=-10.0, help="what is added to every score")
    main(arguments.parse_args())
