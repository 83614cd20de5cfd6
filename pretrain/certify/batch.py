"""A global batch as the reader gives it, made from the recipe's views alone: no shards, no disk.

One row is damaged, two rows are one sample, some rows lack their label and what a sample may lack.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.certify.shrink import ROWS
from pretrain.objectives.joint import Joint
from pretrain.philox import key
from pretrain.reader import Batch
from pretrain.recipe import Recipe
from pretrain.views.regions import Regions
from pretrain.views.spec import RegionView

DAMAGED, TWINS = 7, (5, 11)
COARSE = 4  # pixels of the noise before it is enlarged: fine noise looks alike to every tower


def global_batch(recipe: Recipe, joint: Joint, step: int) -> Batch:
    """ROWS rows of 0-based `step`; the same at any world, and another one for every step and seed."""
    g = torch.Generator().manual_seed(key(recipe.seed, "certify", step) >> 1)
    ids = torch.arange(ROWS) + step * ROWS
    ids[TWINS[0]] = ids[TWINS[1]]
    weight = torch.ones(ROWS)
    weight[DAMAGED] = 0
    present = {v.name: torch.rand(ROWS, generator=g) < 0.7 for v in joint.text_views() if v.after or not v.required}
    tokens = {v.name: _tokens(recipe, present.get(v.name), g) for v in joint.text_views()}
    regions = {v.name: _regions(v, g) for v in joint.region_views()}
    return Batch(
        step=step,
        ids=ids,
        source=torch.zeros(ROWS, dtype=torch.int64),
        epoch=torch.zeros(ROWS, dtype=torch.int64),
        keys=[str(i) for i in ids.tolist()],
        weight=weight,
        labels=_labels(joint, g),
        images={v.name: _image(v.size, g) for v in joint.image_views(recipe.model.image_size)},
        tokens=tokens,
        captions={name: [""] * ROWS for name in tokens},
        present=present | {name: r.mask.any(dim=1) for name, r in regions.items()},
        regions=regions,
    )


def _image(size: int, g: torch.Generator) -> Tensor:
    """(ROWS, 3, size, size) uint8."""
    coarse = torch.randint(0, 256, (ROWS, 3, COARSE, COARSE), generator=g).float()
    return F.interpolate(coarse, size=(size, size), mode="bilinear").to(torch.uint8)


def _tokens(recipe: Recipe, present: Tensor | None, g: torch.Generator) -> Tensor:
    """(ROWS, context) captions of several lengths, their end the highest id; rows of zeros where there is none."""
    text = recipe.model.text
    assert text is not None
    length = torch.randint(2, text.context, (ROWS, 1), generator=g)
    place = torch.arange(text.context)
    words = torch.randint(1, text.vocab - 1, (ROWS, text.context), generator=g)
    tokens = torch.where(place < length, words, 0).masked_fill(place == length, text.vocab - 1)
    return tokens if present is None else tokens * present[:, None]


def _labels(joint: Joint, g: torch.Generator) -> Tensor:
    """(ROWS,) int64 of as many classes as an objective has; -1 for the damaged row and one more."""
    classes = max([2, *(o.options.model_dump().get("classes") or 0 for o in joint.by_name.values())])
    labels = torch.randint(0, classes, (ROWS,), generator=g)
    labels[DAMAGED] = labels[DAMAGED + 1] = -1
    return labels


def _regions(view: RegionView, g: torch.Generator) -> Regions:
    """Boxes to be cut, or stored features; rows with none, with some and with all."""
    mask = torch.rand(ROWS, view.most, generator=g) < 0.5
    mask[0], mask[1] = False, True
    if view.stored_dim:
        features = torch.randn(ROWS, view.most, view.stored_dim + 4, generator=g).half() * mask[..., None]
        return Regions(torch.zeros(ROWS, view.most, 4), features, mask)
    corner = torch.rand(ROWS, view.most, 2, generator=g) * 0.5
    boxes = torch.cat((corner, corner + 0.4), dim=-1) * mask[..., None]
    return Regions(boxes, boxes.new_zeros(ROWS, view.most, 0).half(), mask)
