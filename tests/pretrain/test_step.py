"""Gradients of one step against the plain formula in float64: every parameter, worlds 1, 2, 3, accumulation 1, 4."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.backends.ddp import DDP
from pretrain.backends.replicated import Replicated
from pretrain.distributed.process import Process
from pretrain.models.request import FeatureRequest
from pretrain.models.trunk import build_trunk
from pretrain.objectives import build
from pretrain.objectives.joint import Joint
from pretrain.reader import Batch
from pretrain.recipe import Recipe, parse_recipe
from pretrain.step import TwoStage
from tests.ranks import run_ranks
from tests.tiny import RESNET, VIT, recipe_data

ROWS = 24
IMAGE, TEXT = FeatureRequest("image", "clip"), FeatureRequest("text", "caption")


def recipe(model: dict, accumulation: int) -> Recipe:
    data = recipe_data("shards", "run", model=model, global_batch=ROWS, accumulation=accumulation)
    return parse_recipe(data, "test")


def global_batch(size: int) -> Batch:
    """Random pixels and words; two rows are one sample, one row is damaged."""
    g = torch.Generator().manual_seed(0)
    ids = np.arange(ROWS)
    ids[5] = ids[11]
    weight = torch.ones(ROWS)
    weight[7] = 0
    tokens = torch.zeros(ROWS, 12, dtype=torch.int64)
    tokens[:, :6] = torch.randint(1, 400, (ROWS, 6), generator=g)
    tokens[:, 6] = 49407
    return Batch(
        step=3,
        ids=torch.from_numpy(ids),
        source=torch.zeros(ROWS, dtype=torch.int64),
        epoch=torch.zeros(ROWS, dtype=torch.int64),
        keys=[str(i) for i in range(ROWS)],
        weight=weight,
        images={"clip": torch.randint(0, 256, (ROWS, 3, size, size), dtype=torch.uint8, generator=g)},
        tokens={"caption": tokens},
        captions={"caption": [""] * ROWS},
        labels=torch.full((ROWS,), -1),
    )


def all_gradients(rank: int, world: int) -> list[dict[str, torch.Tensor]]:
    return [gradients(rank, world, VIT, accumulation) for accumulation in (1, 4)]


def gradients(rank: int, world: int, model: dict, accumulation: int) -> dict[str, torch.Tensor]:
    """Loss and gradients of one step, through the backend."""
    r = recipe(model, accumulation)
    process = Process(rank, world, 0, torch.device("cpu"))
    backend = DDP(build_trunk(r.model, seed=1).double(), r, process)
    joint = Joint(build(r.objectives)).double()
    replicated = Replicated(joint, r.optimizer, process)
    two_stage = TwoStage(backend, joint, accumulation=accumulation, seed=0, rank=rank, group=None)
    batch = global_batch(r.model.image_size)
    rows = ROWS // world
    mine = batch.rows(rank * rows, (rank + 1) * rows)
    backend.warm_up(two_stage.inputs(mine))
    result = two_stage(mine)
    replicated.reduce()
    named = {**dict(backend.trunk.named_parameters()), "logit_scale": replicated.parameters()[0]}
    return {"loss": result.loss, **{n: p.grad for n, p in named.items() if p.grad is not None}}


def dense(model: dict) -> dict[str, torch.Tensor]:
    """The same by autograd through the textbook formula, in one piece."""
    r = recipe(model, 1)
    trunk, batch = build_trunk(r.model, seed=1).double(), global_batch(r.model.image_size)
    logit_scale = build(r.objectives)["clip"].logit_scale.detach().double().requires_grad_()
    features = trunk({IMAGE: batch.images["clip"], TEXT: batch.tokens["caption"]})
    kept = batch.weight > 0
    image, text = (F.normalize(features[x], dim=-1)[kept] for x in (IMAGE, TEXT))
    ids = batch.ids[kept]
    logits = logit_scale.exp() * image @ text.T
    off_diagonal = ~torch.eye(len(ids), dtype=torch.bool)
    logits = logits.masked_fill((ids[:, None] == ids[None]) & off_diagonal, -torch.inf)
    target = torch.arange(len(ids))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    loss.backward()
    named = {**dict(trunk.named_parameters()), "logit_scale": logit_scale}
    return {"loss": loss.detach(), **{n: p.grad for n, p in named.items() if p.grad is not None}}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_gradient_equals_the_dense_formula(world):
    expected = dense(VIT)
    ranks = run_ranks(all_gradients, world) if world > 1 else [all_gradients(0, 1)]
    for found in [g for rank in ranks for g in rank]:
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = gradient.abs().max().clamp(min=1e-6)
            assert (found[name] - gradient).abs().max() / scale < 1e-10, name


def test_the_second_pass_repeats_the_first_draw_for_draw():
    """Dropout and BatchNorm on: cached features must be those the gradient is taken through."""
    r = recipe(RESNET, 4)
    process = Process(0, 1, 0, torch.device("cpu"))
    backend = DDP(build_trunk(r.model, seed=1), r, process)
    joint = Joint(build(r.objectives))
    two_stage = TwoStage(backend, joint, accumulation=4, seed=0, rank=0, group=None)
    batch = global_batch(r.model.image_size)
    two_stage(batch)
    found = {n: p.grad for n, p in backend.trunk.named_parameters()}
    statistics = {n: b.clone() for n, b in backend.trunk.named_buffers()}

    again = DDP(build_trunk(r.model, seed=1), r, process)
    one_graph = TwoStage(again, joint, accumulation=4, seed=0, rank=0, group=None)
    parts = [one_graph.features(batch.rows(6 * i, 6 * i + 6), i) for i in range(4)]
    loss, _ = joint.loss({x: torch.cat([p[x] for p in parts]) for x in (IMAGE, TEXT)}, batch, None)
    loss.backward()
    for name, p in again.trunk.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)
    for name, b in again.trunk.named_buffers():  # updated once, not twice
        torch.testing.assert_close(statistics[name], b)


def test_the_backend_that_runs_is_the_one_named():
    assert run_ranks(which, 2) == ["DistributedDataParallel on 2 x cpu"] * 2
    assert which(0, 1) == "Trunk on 1 x cpu"


def which(rank: int, world: int) -> str:
    r = recipe(VIT, 1)
    return DDP(build_trunk(r.model, seed=1), r, Process(rank, world, 0, torch.device("cpu"))).describe()
