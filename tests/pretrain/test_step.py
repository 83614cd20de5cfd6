"""Gradients of one step against the plain formula in float64: every parameter, worlds 1, 2, 3, accumulation 1, 4."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.backends.ddp import DDP
from pretrain.backends.replicated import Replicated
from pretrain.distributed.process import Process
from pretrain.models.lock import lock
from pretrain.models.request import FeatureRequest
from pretrain.models.trunk import build_trunk
from pretrain.objectives import build
from pretrain.objectives.joint import Joint
from pretrain.optim.schedule import Rates
from pretrain.probe import freeze_unreached
from pretrain.reader import Batch
from pretrain.recipe import Recipe, parse_recipe
from pretrain.step import NonFiniteError, TwoStage, update
from tests.ranks import run_ranks
from tests.tiny import FACTS, RESNET, VIT, recipe_data

RATES = Rates(lr=1e-3, weight_decay=0.2)

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
    trunk, joint = build_trunk(r.model, seed=1).double(), Joint(build(r.objectives, FACTS)).double()
    lock(trunk, r.model.lock, joint.requests())
    backend = DDP(trunk, r, process)
    replicated = Replicated(joint, r.optimizer, process)
    two_stage = TwoStage(backend, joint, accumulation=accumulation, seed=0, rank=rank, group=None)
    batch = global_batch(r.model.image_size)
    rows = ROWS // world
    mine = batch.rows(rank * rows, (rank + 1) * rows)
    backend.warm_up(two_stage.inputs(mine))
    result = two_stage(mine)
    replicated.reduce(result.loss)
    named = {**dict(backend.trunk.named_parameters()), "logit_scale": replicated.parameters()[0]}
    return {"loss": result.loss, **{n: p.grad for n, p in named.items() if p.grad is not None}}


def dense(model: dict) -> dict[str, torch.Tensor]:
    """The same by autograd through the textbook formula, in one piece."""
    r = recipe(model, 1)
    trunk, batch = build_trunk(r.model, seed=1).double(), global_batch(r.model.image_size)
    logit_scale = build(r.objectives, FACTS)["clip"].logit_scale.detach().double().requires_grad_()
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


def test_an_update_clips_the_joint_norm_and_keeps_the_temperature_in_bounds():
    for bound in (None, 1e-3):
        backend, replicated, joint, result = one_step()
        parameters = [*backend.trunk.parameters(), *replicated.parameters()]
        joint.by_name["clip"].logit_scale.data.fill_(4.9)  # beyond log 100
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        kept = {p: p.grad for p in parameters if p.grad is not None}
        told = update(backend, replicated, joint, result, step=0, rates=RATES, clip_norm=bound)
        assert told == pytest.approx(norm.item())
        after = torch.linalg.vector_norm(torch.cat([g.flatten() for g in kept.values()]))
        assert after == pytest.approx(bound or norm.item(), rel=1e-3)
        assert joint.by_name["clip"].logit_scale.item() == pytest.approx(math.log(100))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_touches_no_weight(where):
    backend, replicated, joint, result = one_step()
    parameters = [*backend.trunk.parameters(), *replicated.parameters()]
    before = [p.detach().clone() for p in parameters]
    if where == "loss":
        result.loss.fill_(torch.nan)
    else:
        parameters[3].grad.view(-1)[0] = torch.inf
    with pytest.raises(NonFiniteError):
        update(backend, replicated, joint, result, step=0, rates=RATES, clip_norm=1.0)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before))


def test_an_update_is_the_same_on_all_ranks():
    assert len({tuple(figures) for figures in run_ranks(temperature_and_norm, 2)}) == 1


def temperature_and_norm(rank: int, world: int) -> list[float]:
    backend, replicated, joint, result = one_step(rank, world)
    norm = update(backend, replicated, joint, result, step=0, rates=RATES, clip_norm=None)
    return [joint.by_name["clip"].logit_scale.item(), norm.item()]


def one_step(rank: int = 0, world: int = 1):
    r, rows = recipe(VIT, 1), ROWS // world
    process = Process(rank, world, 0, torch.device("cpu"))
    backend, joint = DDP(build_trunk(r.model, seed=1), r, process), Joint(build(r.objectives, FACTS))
    replicated = Replicated(joint, r.optimizer, process)
    two_stage = TwoStage(backend, joint, accumulation=1, seed=0, rank=rank, group=None)
    result = two_stage(global_batch(r.model.image_size).rows(rank * rows, (rank + 1) * rows))
    return backend, replicated, joint, result


def test_draws_differ_by_step_rank_and_micro_batch():
    r = recipe(VIT | {"image_kwargs": VIT["image_kwargs"] | {"proj_drop_rate": 0.5}}, 1)
    backend = DDP(build_trunk(r.model, seed=1), r, Process(0, 1, 0, torch.device("cpu")))
    joint, batch = Joint(build(r.objectives, FACTS)), global_batch(r.model.image_size)

    def draw(step: int, rank: int, micro: int) -> tuple:
        two_stage = TwoStage(backend, joint, accumulation=1, seed=0, rank=rank, group=None)
        return tuple(two_stage.features(replace(batch, step=step), micro)[IMAGE].flatten().tolist())

    assert draw(3, 0, 0) == draw(3, 0, 0)
    assert len({draw(3, 0, 0), draw(4, 0, 0), draw(3, 1, 0), draw(3, 0, 1)}) == 4


def test_the_second_pass_repeats_the_first_draw_for_draw():
    """Dropout and BatchNorm on: cached features must be those the gradient is taken through."""
    r = recipe(RESNET, 4)
    process = Process(0, 1, 0, torch.device("cpu"))
    backend = DDP(build_trunk(r.model, seed=1), r, process)
    joint = Joint(build(r.objectives, FACTS))
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


def test_a_tower_that_no_objective_reads_does_not_stop_two_ranks():
    """DDP waits for the gradient of every parameter; the text tower gets none here."""
    before, after, reached = run_ranks(train_image_only, 2)[0]
    assert not torch.equal(before["image"], after["image"])
    assert torch.equal(before["text"], after["text"])
    assert reached == sorted(n for n, _ in build_trunk(recipe(VIT, 1).model, seed=1).named_parameters() if "image" in n)


def train_image_only(rank: int, world: int) -> tuple:
    r = recipe(VIT, 1)
    trunk = build_trunk(r.model, seed=1)
    size = r.model.image_size
    unreached = freeze_unreached(trunk, {IMAGE: torch.empty(2, 3, size, size, dtype=torch.uint8, device="meta")})
    assert unreached == [n for n, _ in trunk.named_parameters() if n.startswith("text.")]
    backend = DDP(trunk, r, Process(rank, world, 0, torch.device("cpu")))
    inputs = {IMAGE: global_batch(r.model.image_size).rows(rank * 12, rank * 12 + 12).images["clip"]}
    backend.warm_up(inputs)
    before = probe(backend)
    for _ in range(3):
        feature = backend.forward(inputs)[IMAGE]
        backend.backward([feature], [torch.ones_like(feature)])
        reached = sorted(n for n, p in backend.trunk.named_parameters() if p.grad is not None)
        backend.step(RATES)
    return before, probe(backend), reached


def probe(backend: DDP) -> dict[str, torch.Tensor]:
    towers = {"image": backend.trunk.image, "text": backend.trunk.text}
    return {name: torch.cat([p.detach().flatten() for p in tower.parameters()]) for name, tower in towers.items()}


def test_bf16_is_what_the_towers_compute_in_and_fp32_what_they_hand_over():
    found = {}
    for precision in ("fp32", "bf16"):
        r = recipe(VIT, 1).model_copy(update={"precision": precision})
        backend = DDP(build_trunk(r.model, seed=1), r, Process(0, 1, 0, torch.device("cpu")))
        found[precision] = backend.forward({IMAGE: global_batch(r.model.image_size).images["clip"]})[IMAGE].detach()
    assert found["bf16"].dtype == torch.float32
    difference = (found["fp32"] - found["bf16"]).abs().max() / found["fp32"].abs().max()
    assert 1e-4 < difference < 0.1


def test_the_backend_that_runs_is_the_one_named():
    assert run_ranks(which, 2) == ["DistributedDataParallel on 2 x cpu"] * 2
    assert which(0, 1) == "PyTorch on 1 x cpu"


def which(rank: int, world: int) -> str:
    r = recipe(VIT, 1)
    return DDP(build_trunk(r.model, seed=1), r, Process(rank, world, 0, torch.device("cpu"))).describe()
