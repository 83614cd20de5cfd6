"""Decode and random resized crop to 224, one thread, CPU a photograph: ours beside open_clip's training
transform.

  POLYVIEW_DATA=... python -m benchmarks.decode [--images 200] [--rounds 5] [--json PATH]

open_clip: Image.open, convert("RGB"), `image_transform(224, is_train=True)`: a float, normalised tensor.
Ours: a uint8 tensor, to be normalised on the device; a second row normalises on the CPU as well. The mean
difference is of the two resizes' pixels (0 to 255) for the same boxes.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from open_clip.transform import image_transform
from PIL import Image

from benchmarks.common import measure, parser, report
from benchmarks.photographs import SETS, photographs
from pretrain.views.decode import Scratch, decode
from pretrain.views.geometry import UNIFORMS, crop_box, random_resized_crop
from pretrain.views.spec import ImageView

BAR = 2.5
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None] * 255
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None] * 255
CROPS = {
    "scale .9-1": ImageView("image", 224),
    "scale .08-1": ImageView("image", 224, scale=(0.08, 1.0)),
}


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--images", type=int, default=200, help="photographs of each set")
    args = p.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in SETS:
        files = list(photographs(name, args.images).values())
        for crop, view in CROPS.items():
            rows += compare(f"{name}, {crop}", files, view, args.rounds)
    report("decode + RandomResizedCrop(224), CPU, one thread", rows, args)


def compare(title: str, files: list[bytes], view: ImageView, rounds: int) -> list[dict]:
    peer = image_transform(view.size, is_train=True, aug_cfg={"scale": view.scale})
    scratch = Scratch()
    uniforms = np.random.default_rng(0).random((len(files), UNIFORMS))

    def theirs() -> None:
        for data in files:
            peer(Image.open(io.BytesIO(data)).convert("RGB"))

    def ours() -> None:
        for data, u in zip(files, uniforms):
            random_resized_crop(decode(data, scratch=scratch), view, u)

    def ours_normalised() -> None:
        for data, u in zip(files, uniforms):
            random_resized_crop(decode(data, scratch=scratch), view, u).float().sub_(MEAN).div_(STD)

    seconds = measure({"open_clip": theirs, "ours": ours, "ours + normalise": ours_normalised}, rounds)
    apart = difference(files, view, uniforms)
    return [
        {
            "set": title,
            "what": what,
            "ms an image": s / len(files) * 1e3,
            "images / CPU s": len(files) / s,
            "times open_clip": seconds["open_clip"] / s,
            "bar": {"ours": BAR}.get(what, ""),
            "mean difference": "" if what == "open_clip" else apart,
        }
        for what, s in seconds.items()
    ]


def difference(files: list[bytes], view: ImageView, uniforms: np.ndarray) -> float:
    """Mean absolute difference of pixels, 0 to 255, for the same boxes."""
    apart = []
    for data, u in zip(files, uniforms):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        top, left, height, width = crop_box(image.height, image.width, view, u)
        crop = image.crop((left, top, left + width, top + height))
        theirs = np.asarray(crop.resize((view.size, view.size), Image.Resampling.BICUBIC)).astype(int)
        ours = random_resized_crop(decode(data), view, u).permute(1, 2, 0).numpy()
        apart.append(np.abs(theirs - ours).mean())
    return float(np.mean(apart))


if __name__ == "__main__":
    main()
