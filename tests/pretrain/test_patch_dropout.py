"""Patch dropout: patches are left out in training alone, the same ones whenever a micro-batch is run again."""

from __future__ import annotations

import pytest
import torch

from pretrain.backends.ddp import DDP
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.models.momentum import MomentumCopy
from pretrain.models.request import FeatureRequest
from pretrain.models.trunk import Trunk, build_trunk
from pretrain.objectives import build
from pretrain.objectives.base import Features, Loss, Objective
from pretrain.objectives.joint import Joint
from pretrain.parts import assemble
from pretrain.recipe import ModelRecipe, parse_recipe
from pretrain.step import TwoStage
from pretrain.views.spec import ImageView
from tests.pretrain.test_step import IMAGE, TEXT, global_batch, recipe
from tests.tiny import FACTS, VIT, recipe_data

HALF = VIT | {"image_size": 32, "patch_dropout": 0.5}
"""Of 16 patches, 8."""


def tokens_seen(trunk: Trunk, run: Trunk | MomentumCopy) -> int:
    """Tokens of an image in the trunk's first block when `run` is called."""
    seen = []
    hook = trunk.image.backbone.blocks[0].register_forward_hook(lambda _, x, __: seen.append(x[0].shape[1]))
    run({IMAGE: torch.zeros(2, 3, 32, 32, dtype=torch.uint8)})
    hook.remove()
    return seen[0]


def test_patches_are_left_out_in_training_alone_and_never_by_a_teacher():
    trunk = build_trunk(ModelRecipe(**HALF), seed=0)
    teacher = MomentumCopy(trunk)
    assert tokens_seen(trunk, trunk) == 1 + 8
    assert tokens_seen(trunk, trunk.eval()) == 1 + 16
    assert tokens_seen(teacher.copy, teacher) == 1 + 16


def test_a_locked_tower_leaves_none_out():
    data = recipe_data("shards", "run", model=HALF | {"lock": {"image": True}})
    trunk = assemble(parse_recipe(data, "test"), 60, Process(0, 1, 0, torch.device("cpu"))).backend.trunk
    assert trunk.training
    assert tokens_seen(trunk, trunk) == 1 + 16


def two_stage(accumulation: int) -> TwoStage:
    r = recipe(HALF, accumulation)
    backend = DDP(build_trunk(r.model, seed=1).double(), r, Process(0, 1, 0, torch.device("cpu")))
    joint = Joint(build(r.objectives, FACTS)).double()
    return TwoStage(backend, joint, accumulation=accumulation, seed=0, rank=0, group=None)


def test_features_run_again_are_the_cached_ones_bit_for_bit(monkeypatch):
    four, batch = two_stage(4), global_batch(32)
    seen, forward = [], four.backend.forward
    monkeypatch.setattr(four.backend, "forward", lambda inputs: (seen.append(forward(inputs)), seen[-1])[1])
    four(batch)
    for cached, again in zip(seen[:4], seen[4:], strict=True):
        assert again[IMAGE].requires_grad
        assert torch.equal(cached[IMAGE], again[IMAGE])
        assert torch.equal(cached[TEXT], again[TEXT])
    four.backend.trunk.eval()
    assert not torch.equal(seen[0][IMAGE], four.features(batch.rows(0, 6), 0)[IMAGE])


def test_accumulation_changes_nothing_but_the_draws():
    """Four micro-batches against one graph over all rows, each left the patches of its micro-batch."""
    four, one, batch = two_stage(4), two_stage(1), global_batch(32)
    result = four(batch)
    parts = [one.features(batch.rows(6 * i, 6 * i + 6), i) for i in range(4)]
    loss, _ = one.joint.loss({x: torch.cat([p[x] for p in parts]) for x in (IMAGE, TEXT)}, batch, None)
    loss.backward()
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=0)
    for (name, p), q in zip(four.backend.trunk.named_parameters(), one.backend.trunk.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=name)
    other = two_stage(1)(batch)
    assert other.loss != result.loss


class Layers(Objective):
    """Reads the tokens of a block, as an objective of one's own may."""

    tokens = FeatureRequest("image", "whole", from_layer=0)

    def image_views(self, size: int) -> list[ImageView]:
        return [ImageView("whole", size)]

    def requests(self) -> list[FeatureRequest]:
        return [self.tokens]

    def loss(self, features: Features, batch, group) -> Loss:
        return Loss(features[self.tokens].square().mean())

    def sample_losses(self, features: Features, batch) -> torch.Tensor:
        return features[self.tokens].square().mean(dim=(1, 2))


OBJECTIVE = Layers


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"image": "resnet18", "image_kwargs": {}}, "model.patch_dropout: resnet18 has no patches"),
        ({"regions": {"blocks": 1}}, "model.regions with stored_dim: null needs all patches"),
        ({"leff": 1}, "model.leff needs all patches"),
    ],
)
def test_what_needs_all_patches_is_refused_by_name(model, message):
    with pytest.raises(UserError, match=message):
        build_trunk(ModelRecipe(**(HALF | model)), seed=0)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_tokens_of_a_block_and_patch_dropout_are_refused_together(rate):
    model = HALF | {"patch_dropout": rate, "text": None}
    r = parse_recipe(recipe_data("shards", "run", model=model, objectives={__name__: 1.0}), "test")
    if not rate:
        assemble(r, 60, Process(0, 1, 0, torch.device("cpu")))
        return
    with pytest.raises(UserError, match=r"model\.patch_dropout"):
        assemble(r, 60, Process(0, 1, 0, torch.device("cpu")))


def test_stored_regions_go_with_patch_dropout():
    build_trunk(ModelRecipe(**(HALF | {"regions": {"blocks": 1, "stored_dim": 6}})), seed=0)
