"""The region branch and LeFF: what regions see, what masks hide, what an absent row costs, LeFF against plain torch."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from pretrain.errors import UserError
from pretrain.models.leff import LeFF
from pretrain.models.request import FeatureRequest, RegionInput
from pretrain.models.trunk import Trunk, build_trunk
from pretrain.recipe import ModelRecipe
from pretrain.views.regions import Regions
from tests.tiny import VIT

CROP = FeatureRequest("image", "crop")
REGIONS = FeatureRequest("image", "regions", output="regions")
MASK = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)
RESNET = {"image": "resnet50_clip", "image_size": 64, "image_kwargs": {}, "text": None, "embed_dim": 8}


def trunk(stored_dim: int | None = None, **changes) -> tuple[Trunk, ModelRecipe]:
    depth = {**VIT["image_kwargs"], "depth": 3}
    regions = {"blocks": 2, "most": 3, "stored_dim": stored_dim}
    model = ModelRecipe.model_validate(
        VIT | {"text": None, "image_size": 32, "image_kwargs": depth, "regions": regions} | changes
    )
    return build_trunk(model, seed=0).eval(), model


def inputs(size: int, stored_dim: int | None = None, mask: torch.Tensor = MASK) -> RegionInput:
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(3, 3, 2, generator=g) / 2
    boxes = torch.cat((corner, corner + 0.4), dim=2) * mask[..., None]
    features = torch.randn(3, 3, stored_dim + 4 if stored_dim else 0, generator=g).half() * mask[..., None]
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=g)
    return RegionInput(Regions(boxes, features, mask), "crop", images)


def embed(made: Trunk, x: RegionInput) -> torch.Tensor:
    return made({REGIONS: x})[REGIONS]


KINDS = [(None, {}), (5, {}), (None, RESNET), (7, RESNET), (None, {"leff": 1})]


@pytest.mark.parametrize(("stored", "changes"), KINDS)
def test_what_lies_under_the_mask_reaches_nothing(stored, changes):
    made, model = trunk(stored, **changes)
    x = inputs(model.image_size, stored)
    hidden = ~MASK[..., None]
    junk = x.regions._replace(
        boxes=x.regions.boxes.masked_fill(hidden, 0.7), features=x.regions.features.masked_fill(hidden, 9.0)
    )
    found, again = embed(made, x), embed(made, x._replace(regions=junk))
    torch.testing.assert_close(found, again, rtol=0, atol=1e-6)
    assert found[1].eq(0).all()
    assert found[[0, 2]].norm(dim=1).min() > 0.1


@pytest.mark.parametrize(("stored", "changes"), KINDS)
def test_places_to_spare_change_nothing(stored, changes):
    made, model = trunk(stored, **changes)
    x = inputs(model.image_size, stored)
    padded = Regions(*(torch.cat((part, torch.zeros_like(part)), dim=1) for part in x.regions))
    torch.testing.assert_close(embed(made, x._replace(regions=padded)), embed(made, x), rtol=1e-5, atol=1e-6)


def test_the_branch_is_the_last_blocks_behind_the_class_token():
    """Written out for one row at a time, over its own regions alone: no mask, no padding."""
    made, _ = trunk(5)
    x = inputs(32, 5)
    vit, branch = made.image.backbone, made.image.regions
    found = embed(made, x)
    for row in (0, 2):
        tokens = branch.embed(x.regions.features[row, MASK[row]].float())[None]
        y = vit.norm_pre(torch.cat((vit.cls_token, tokens), dim=1))
        for block in vit.blocks[1:]:
            y = block(y)
        torch.testing.assert_close(found[row], made.image.projection(vit.norm(y)[0, 0]))


def test_a_region_is_the_mean_of_the_map_under_its_box():
    """A box on the borders of the map's cells: the mean of these cells, to the interpolation's rounding."""
    made, _ = trunk()
    x = inputs(32)
    boxes = torch.zeros(3, 3, 4)
    boxes[0, 0] = torch.tensor([0.25, 0.5, 1.0, 1.0])  # of a 4 x 4 grid: columns 1 to 3, rows 2 and 3
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[0, 0] = True
    tower = made.image
    image_map = tower(x.images, ("map",))["map"]
    assert image_map.shape == (3, 16, 4, 4)
    tokens = tower(x.images, (0,))[0]
    torch.testing.assert_close(image_map, tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
    seen: list[torch.Tensor] = []
    tower.regions.embed.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    made({REGIONS: x._replace(regions=Regions(boxes, x.regions.features, mask))})
    flat = torch.full_like(image_map[:1], 3.0)
    made.image.embed_regions(Regions(boxes[:1], x.regions.features[:1], mask[:1]), flat)
    assert seen[0].shape == (1, 3, 20)
    torch.testing.assert_close(seen[0][0, 0, 16:], boxes[0, 0])
    assert seen[1][0, 0, :16].eq(3.0).all()
    inner = image_map[0, :, 2:, 1:].mean(dim=(1, 2))
    assert F.cosine_similarity(seen[0][0, 0, :16], inner, dim=0) > 0.95


def test_regions_are_cut_by_the_kernel_and_nothing_is_compiled(monkeypatch):
    """torchvision's function compiles another where algorithms must be deterministic: only its backward need be so."""
    module = sys.modules["torchvision.ops.roi_align"]
    monkeypatch.setattr(module, "_has_ops", lambda: False)  # leads a CPU there too
    monkeypatch.setattr(module, "_roi_align", lambda *_: pytest.fail("compiled"))
    made, _ = trunk()
    assert embed(made, inputs(32))[0].norm() > 0.1


def test_the_map_takes_no_gradient_and_the_last_blocks_do():
    made, _ = trunk()
    embed(made, inputs(32)).sum().backward()
    reached = {name for name, p in made.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert "image.regions.embed.weight" in reached
    assert "image.backbone.cls_token" in reached
    assert any(name.startswith("image.backbone.blocks.1.") for name in reached)
    assert not any(name.startswith(("image.backbone.blocks.0.", "image.backbone.patch_embed")) for name in reached)


@pytest.mark.parametrize(("stored", "changes"), KINDS)
def test_a_batch_without_regions_runs_nothing_and_still_reaches_every_parameter(stored, changes):
    made, model = trunk(stored, **changes)
    some, none = inputs(model.image_size, stored), inputs(model.image_size, stored, MASK & False)
    embed(made, some).sum().backward()
    reached = {name for name, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    rows: list[int] = []
    made.image.regions.embed.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    found = embed(made, none)
    found.sum().backward()
    assert found.eq(0).all()
    assert rows == [0]
    assert {name for name, p in made.named_parameters() if p.grad is not None} == reached
    assert all(p.grad.eq(0).all() for p in made.parameters() if p.grad is not None)


def test_a_crop_asked_for_twice_is_seen_once():
    made, _ = trunk()
    passes: list[int] = []
    made.image.backbone.patch_embed.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
    x = inputs(32)
    both = made({CROP: x.images, REGIONS: x})
    assert passes == [3]
    torch.testing.assert_close(both[CROP], made({CROP: x.images})[CROP])


def test_towers_that_cannot_are_named():
    for changes, told in (
        ({"image": "resnet18", "image_kwargs": {}}, "CLIP's ResNets, not resnet18"),
        ({"regions": {"blocks": 3}}, "has 3 blocks in all"),
        ({"leff": 2}, "cannot run through the first 2"),
        ({"leff": 4, "regions": None}, "no ViT of at least 4 blocks"),
        ({"image": "resnet18", "image_kwargs": {}, "regions": None, "leff": 1}, "resnet18 is no ViT"),
    ):
        with pytest.raises(UserError, match=told):
            trunk(**changes)
    made, _ = trunk(regions=None)
    with pytest.raises(UserError, match=r"model\.regions: null"):
        made.image.embed_regions(inputs(32).regions, None)


def test_leff_is_the_formula():
    """Patch by patch and channel by channel, with a convolution written out over shifted, zero-padded grids."""
    torch.manual_seed(0)
    leff = LeFF(4, 8, prefix=1).double()
    with torch.no_grad():
        for p in leff.parameters():
            p.normal_()
    x = torch.randn(2, 1 + 9, 4, dtype=torch.float64)

    def norm(y, of):  # y (N, C): the batch's own statistics
        return (y - y.mean(0)) / (y.var(0, unbiased=False) + of.eps).sqrt() * of.weight + of.bias

    def quick(y):
        return y * torch.sigmoid(1.702 * y)

    y = quick(norm((x[:, 1:] @ leff.fc1.weight.T + leff.fc1.bias).reshape(18, 8), leff.norm1)).view(2, 3, 3, 8)
    padded = F.pad(y, (0, 0, 1, 1, 1, 1))
    mixed = sum(padded[:, i : i + 3, j : j + 3] * leff.conv.weight[:, 0, i, j] for i in range(3) for j in range(3))
    y = quick(norm(mixed.reshape(18, 8), leff.norm2))
    y = quick(norm(y @ leff.fc2.weight.T + leff.fc2.bias, leff.norm3)).view(2, 9, 4)
    torch.testing.assert_close(leff(x), torch.cat((x[:, :1], y), dim=1), rtol=1e-10, atol=1e-10)
