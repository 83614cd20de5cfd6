"""SwAV's eight views of a photograph, from JPEG bytes to normalised floats, one thread, CPU an image: ours beside
the official pipeline on Pillow images.

  POLYVIEW_DATA=... python -m benchmarks.swav_views [--images 250] [--rounds 5] [--device cpu] [--json PATH]

Views: 2 of 224 (scale .14-1) and 6 of 96 (.05-.14), bilinear, flip .5, jitter (.8 .8 .8 .2) p .8, grey .2, blur p .5
of sigma .1-2. Official (SwAV, src/multicropdataset.py): torchvision's transforms on Pillow images, each view one
image after the other. Ours: the reader's own functions, decode once, eight crops, photometric changes in batches of
64, then uint8 to float and (x - mean) * scale. Parts are ours with the later steps left out, so they add up.

With `--device cuda` the crops are sent to the GPU and changed and normalised there; the figure is still CPU seconds.
"""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from benchmarks.common import measure, parser, report
from benchmarks.photographs import SETS, photographs
from pretrain.philox import uniforms
from pretrain.views.decode import Scratch, decode
from pretrain.views.geometry import UNIFORMS, random_resized_crop
from pretrain.views.photometric import apply, draw
from pretrain.views.spec import Blur, ImageView, Jitter

BAR = 1.5
BATCH = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)
VIEWS = [
    ImageView(
        f"swav/{i}",
        224 if i < 2 else 96,
        scale=(0.14, 1.0) if i < 2 else (0.05, 0.14),
        flip=0.5,
        interpolation="bilinear",
        jitter=Jitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        grey=0.2,
        blur=Blur(p=0.5, sigma=(0.1, 2.0)),
    )
    for i in range(8)
]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--images", type=int, default=250, help="photographs of each set")
    p.add_argument("--device", default="cpu", help="where ours makes the photometric changes: cpu or cuda")
    args = p.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in SETS:
        files = list(photographs(name, args.images).values())
        rows += compare(name, files, args.rounds, torch.device(args.device))
    report(f"SwAV views (2 x 224 + 6 x 96), CPU, one thread, photometrics on {args.device}", rows, args)


def compare(title: str, files: list[bytes], rounds: int, device: torch.device) -> list[dict]:
    peer, scratch = [official(view) for view in VIEWS], Scratch()
    mean = torch.tensor(MEAN, device=device).view(3, 1, 1) * 255
    scale = 1 / (torch.tensor(STD, device=device).view(3, 1, 1) * 255)

    def theirs() -> None:
        for data in files:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            for transform in peer:
                transform(image)

    def decoded() -> None:
        for data in files:
            decode(data, scratch=scratch)

    def cropped() -> None:
        for _ in crops(files, scratch):
            pass

    def changed(normalise: bool = False) -> None:
        for ids, batch in crops(files, scratch):
            for view, pixels in zip(VIEWS, batch):
                x = apply(torch.from_numpy(pixels).to(device), draw(view, 0, 0, 0, ids))
                if normalise:
                    x.float().sub_(mean).mul_(scale)
        if device.type == "cuda":
            torch.cuda.synchronize()

    steps = {"decode": decoded, "geometry": cropped, "photometrics": changed, "ours": lambda: changed(True)}
    seconds = measure({"official": theirs, **steps}, rounds)
    return rows_of(title, {name: s / len(files) * 1e3 for name, s in seconds.items()})


def crops(files: list[bytes], scratch: Scratch) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """(ids, uint8 crops of every view), a batch at a time, as the reader makes them."""
    for first in range(0, len(files), BATCH):
        ids = np.arange(first, min(first + BATCH, len(files)))
        u = [uniforms(0, 0, 0, ids, view.name, UNIFORMS) for view in VIEWS]
        batch = [np.empty((len(ids), 3, view.size, view.size), np.uint8) for view in VIEWS]
        for row, data in enumerate(files[first : first + BATCH]):
            pixels = decode(data, scratch=scratch)
            for view, numbers, place in zip(VIEWS, u, batch):
                np.copyto(place[row], random_resized_crop(pixels, view, numbers[row]).numpy())
        yield ids, batch


def official(view: ImageView) -> transforms.Compose:
    """SwAV's transform for a view."""
    assert view.jitter
    jitter = transforms.ColorJitter(
        view.jitter.brightness, view.jitter.contrast, view.jitter.saturation, view.jitter.hue
    )
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(view.size, scale=view.scale),
            transforms.RandomHorizontalFlip(p=view.flip),
            transforms.RandomApply([jitter], p=view.jitter.p),
            transforms.RandomGrayscale(p=view.grey),
            pillow_blur,
            transforms.ToTensor(),
            transforms.Normalize(mean=MEAN, std=STD),
        ]
    )


def pillow_blur(image: Image.Image) -> Image.Image:
    """SwAV's PILRandomGaussianBlur(p=.5, radius .1-2)."""
    if random.random() > 0.5:
        return image
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def rows_of(title: str, ms: dict[str, float]) -> list[dict]:
    """The two pipelines, then ours step by step."""
    parts = ["decode", "geometry", "photometrics", "ours"]
    spent = {"decode": ms["decode"]} | {b: ms[b] - ms[a] for a, b in itertools.pairwise(parts)}
    spent["normalise"] = spent.pop("ours")
    rows = [("official", ms["official"]), ("ours", ms["ours"]), *((f"of it {k}", v) for k, v in spent.items())]
    return [
        {
            "set": title,
            "what": what,
            "ms an image": value,
            "images / CPU s": 1e3 / value,
            "times official": ms["official"] / value if what in ("official", "ours") else "",
            "bar": BAR if what == "ours" else "",
        }
        for what, value in rows
    ]


if __name__ == "__main__":
    main()
