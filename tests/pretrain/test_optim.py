"""Rates and optimizers beside open_clip's, SwAV's and DINO's schedules, torch's optimizers and the formula of LARS."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from pretrain.backends.state import load_optimizer, optimizer_tensors
from pretrain.checkpoint import CheckpointWriter, open_checkpoint, slice_for_rank, step_dir
from pretrain.errors import UserError
from pretrain.models.trunk import build_trunk
from pretrain.optim.build import build_optimizer, layer_scales, set_rates
from pretrain.optim.schedule import Rates, lr_at, rates_at, weight_decay_at
from pretrain.recipe import OptimizerRecipe, ScheduleRecipe, parse_recipe
from tests.ranks import run_ranks
from tests.tiny import VIT, recipe_data

LARS = OptimizerRecipe(name="lars", lr=4.8, weight_decay=1e-2, exclude_vectors=False)
SGD = OptimizerRecipe(name="sgd", lr=0.1, weight_decay=1e-2, exclude_vectors=False)
MUON = OptimizerRecipe(name="muon", weight_decay=0.3)


def test_the_schedule_is_open_clips():
    scheduler = pytest.importorskip("open_clip_train.scheduler")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = scheduler.cosine_lr(optimizer, 0.5, 7, 50)
    for step in range(50):
        theirs(step)
        assert lr_at(step, 50, 0.5, ScheduleRecipe(warmup_steps=7)) == pytest.approx(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(("warmup", "start", "final"), [(3120, 0.3, 0.0048), (0, 0.0, 0.0006), (1, 0.3, 0.0)])
def test_the_schedule_is_swavs(warmup: int, start: float, final: float):
    total, peak = 31_200, 4.8
    t = np.arange(total - warmup)
    cosine = final + 0.5 * (peak - final) * (1 + np.cos(np.pi * t / (total - warmup)))
    theirs = np.concatenate((np.linspace(start, peak, warmup), cosine))
    recipe = ScheduleRecipe(warmup_steps=warmup, warmup_start=start / peak, final=final / peak)
    ours = [lr_at(step, total, peak, recipe) for step in range(total)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)


def test_the_schedule_rises_to_the_peak_and_ends_at_its_share():
    recipe = ScheduleRecipe(warmup_steps=4, final=0.1)
    rates = [lr_at(step, 100, 2.0, recipe) for step in range(101)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[52] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[100] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_the_weight_decay_is_dinos():
    steps = np.arange(1000)
    theirs = 0.4 + 0.5 * (0.04 - 0.4) * (1 + np.cos(np.pi * steps / len(steps)))
    ours = [weight_decay_at(step, 1000, 0.04, 0.4) for step in steps.tolist()]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert weight_decay_at(700, 1000, 0.04, None) == 0.04
    optimizer = {"lr": 2.0, "weight_decay": 0.04, "weight_decay_final": 0.4}
    recipe = parse_recipe(recipe_data("s", "r", optimizer=optimizer, schedule={"warmup_steps": 10}), "test")
    assert rates_at(0, 1000, recipe) == pytest.approx(Rates(lr=0.2, weight_decay=0.04))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "muon"])
def test_matrices_are_decayed_and_vectors_are_not(name: str):
    trunk = build_trunk(parse_recipe(recipe_data("s", "r", model=VIT), "test").model, seed=0)
    named = {**dict(trunk.named_parameters()), "logit_scale": nn.Parameter(torch.zeros(1))}
    optimizer = build_optimizer(named, OptimizerRecipe(name=name, weight_decay=0.1))
    set_rates(optimizer, Rates(lr=0.25, weight_decay=0.3))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(named.values())
    for key, p in named.items():
        vector = p.ndim < 2 or "cls_token" in key
        assert decay[p] == (0.0 if vector else 0.3), key
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


def test_vectors_are_decayed_where_the_recipe_says_so():
    optimizer = build_optimizer({"w": nn.Parameter(torch.ones(2, 2)), "b": nn.Parameter(torch.ones(2))}, SGD)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    assert len(build_optimizer({"f": frozen, "w": nn.Parameter(torch.ones(2))}, SGD).param_groups[0]["params"]) == 1


# ---- beside torch's optimizers and the formula


def _parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    """In float64: a matrix, a norm's scale, a bias that starts as 0, prototypes that wait for a gradient, a block."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (5, 7), "scale": (5,), "bias": (5,), "prototypes": (6, 5), "silent": (3, 4)}
    shapes |= {"text.blocks.0.qkv.weight": (9, 4), "text.blocks.0.fc1.weight": (8, 3)}
    tensors = {n: torch.randn(s, dtype=torch.float64, generator=draw) for n, s in shapes.items()}
    tensors["bias"].zero_()
    return {n: nn.Parameter(t) for n, t in tensors.items()}


def _gradients(step: int) -> dict[str, torch.Tensor | None]:
    """`prototypes` have none in the first two steps, `silent` always zeros."""
    draw = torch.Generator().manual_seed(100 + step)
    found = {n: torch.randn(p.shape, dtype=torch.float64, generator=draw) for n, p in _parameters().items()}
    return found | {"silent": torch.zeros(3, 4, dtype=torch.float64)} | ({"prototypes": None} if step < 2 else {})


def _run(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for name, gradient in _gradients(step).items():
            parameters[name].grad = None if gradient is None else gradient.clone()
        set_rates(optimizer, Rates(lr=0.5 / (1 + step), weight_decay=0.01 * (1 + step)))
        optimizer.step()


def _official_lars(recipe: OptimizerRecipe, steps: int) -> dict[str, torch.Tensor]:
    """apex's LARC(clip=False) around SGD with momentum, one tensor at a time, from its description."""
    found = {name: p.detach().clone() for name, p in _parameters().items()}
    momentum: dict[str, torch.Tensor] = {}
    for step in range(steps):
        lr, decay = 0.5 / (1 + step), 0.01 * (1 + step)
        for name, g in _gradients(step).items():
            p = found[name]
            if g is None:
                continue
            plain = recipe.exclude_vectors and p.ndim < 2
            if not plain and p.norm() != 0 and g.norm() != 0:
                g = (g + decay * p) * 0.001 * p.norm() / (g.norm() + decay * p.norm() + 1e-8)
            momentum[name] = g if name not in momentum else 0.9 * momentum[name] + g
            p -= lr * (g + 0.9 * momentum[name] if recipe.nesterov else momentum[name])
    return found


@pytest.mark.parametrize("changes", [{}, {"exclude_vectors": True}, {"nesterov": True}])
def test_lars_is_the_formula(changes: dict):
    recipe = LARS.model_copy(update=changes)
    parameters = _parameters()
    _run(parameters, build_optimizer(parameters, recipe), 0, 6)
    for name, expected in _official_lars(recipe, 6).items():
        torch.testing.assert_close(parameters[name].detach(), expected, rtol=1e-12, atol=1e-14, msg=name)


def test_what_has_no_gradient_is_left_alone():
    parameters = _parameters()
    before = parameters["prototypes"].detach().clone()
    optimizer = build_optimizer(parameters, LARS)
    _run(parameters, optimizer, 0, 2)
    assert torch.equal(parameters["prototypes"], before)
    assert not optimizer.state.get(parameters["prototypes"])
    _run(parameters, optimizer, 2, 3)
    assert not torch.equal(parameters["prototypes"], before)


def test_a_tensor_whose_gradient_is_zero_is_not_decayed_by_lars():
    parameters = _parameters()
    before = parameters["silent"].detach().clone()
    _run(parameters, build_optimizer(parameters, LARS), 0, 3)
    assert torch.equal(parameters["silent"], before)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs(nesterov: bool):
    ours, theirs = _parameters(), _parameters()
    optimizer = torch.optim.SGD(theirs.values(), lr=1.0, momentum=0.8, nesterov=nesterov, weight_decay=0.01)
    for step in range(5):
        for name, gradient in _gradients(step).items():
            theirs[name].grad = gradient
        optimizer.param_groups[0] |= {"lr": 0.5 / (1 + step), "weight_decay": 0.01 * (1 + step)}
        optimizer.step()
    recipe = SGD.model_copy(update={"momentum": 0.8, "nesterov": nesterov})
    _run(ours, build_optimizer(ours, recipe), 0, 5)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-14, msg=name)


def test_adamw_is_torchs():
    ours, theirs = _parameters(), _parameters()
    vectors = [p for p in theirs.values() if p.ndim < 2]
    groups = [{"params": [p for p in theirs.values() if p.ndim > 1]}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.01)
    for step in range(5):
        for name, gradient in _gradients(step).items():
            theirs[name].grad = gradient
        optimizer.param_groups[0]["weight_decay"] = 0.01 * (1 + step)
        for group in optimizer.param_groups:
            group["lr"] = 0.5 / (1 + step)
        optimizer.step()
    _run(ours, build_optimizer(ours, OptimizerRecipe(betas=(0.8, 0.95), eps=1e-7)), 0, 5)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-12, msg=name)


def test_muon_is_torchs_for_the_matrices_of_blocks_and_adamw_for_the_rest():
    ours, theirs = _parameters(), _parameters()
    blocks = {n: theirs.pop(n).detach() for n in [*theirs] if "blocks" in n}
    pieces = [
        nn.Parameter(x.clone()) for x in (*blocks["text.blocks.0.qkv.weight"].chunk(3), *list(blocks.values())[1:])
    ]
    adamw = {"lr": 0.5, "betas": (0.8, 0.95), "eps": 1e-7}
    muon = torch.optim.Muon(pieces, lr=0.5, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    vectors = [p for p in theirs.values() if p.ndim < 2]
    groups = [{"params": [p for p in theirs.values() if p.ndim > 1]}, {"params": vectors, "weight_decay": 0.0}]
    rest = torch.optim.AdamW(groups, **adamw, weight_decay=0.3)
    optimizer = build_optimizer(ours, OptimizerRecipe(name="muon", betas=(0.8, 0.95), eps=1e-7))
    for step in range(5):
        gradients = _gradients(step)
        for name, p in theirs.items():
            p.grad = gradients[name]
        for p, g in zip(
            pieces, (*gradients["text.blocks.0.qkv.weight"].chunk(3), gradients["text.blocks.0.fc1.weight"])
        ):
            p.grad = g
        muon.step()
        rest.step()
        for name, p in ours.items():
            p.grad = gradients[name]
        set_rates(optimizer, Rates(lr=0.5, weight_decay=0.3))
        optimizer.step()
    moved = {**theirs, "text.blocks.0.qkv.weight": torch.cat(pieces[:3]), "text.blocks.0.fc1.weight": pieces[3]}
    for name, p in ours.items():
        torch.testing.assert_close(p, moved[name], rtol=1e-9, atol=1e-12, msg=name)
    assert not torch.equal(ours["text.blocks.0.qkv.weight"], _parameters()["text.blocks.0.qkv.weight"])


def test_muon_takes_the_matrices_of_both_towers_blocks_alone():
    trunk = build_trunk(parse_recipe(recipe_data("s", "r", model=VIT), "test").model, seed=0)
    named = dict(trunk.named_parameters())
    optimizer = build_optimizer(named, OptimizerRecipe(name="muon", layer_decay=0.5))
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    pieces = {name: group_of[p]["pieces"] for name, p in named.items() if group_of[p]["pieces"]}
    kinds = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}
    wanted = {f"image.backbone.blocks.{i}.{n}.weight": k for i in range(2) for n, k in kinds.items()}
    kinds = {"qkv": 3, "proj": 1, "fc1": 1, "fc2": 1}
    assert pieces == wanted | {f"text.blocks.{i}.{n}.weight": k for i in range(2) for n, k in kinds.items()}
    assert group_of[named["text.blocks.0.qkv.weight"]]["lr_scale"] == 0.5
    with pytest.raises(UserError, match="no block of the towers has a trained matrix"):
        build_optimizer({"image.backbone.layer1.0.conv1.weight": nn.Parameter(torch.ones(2, 2, 3, 3))}, MUON)


def _spread(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Muon's and AdamW's steps over rows that lie on several ranks, against whole tensors."""
    mesh = init_device_mesh("cpu", (world,))
    alone, spread = _parameters(), _parameters()
    spread = {n: nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for n, p in spread.items()}
    optimizers = [build_optimizer(p, MUON) for p in (alone, spread)]
    for step in range(4):
        for parameters, optimizer in zip((alone, spread), optimizers):
            for name, gradient in _gradients(step).items():
                if gradient is not None and parameters is spread:
                    gradient = distribute_tensor(gradient, mesh, [Shard(0)])
                parameters[name].grad = gradient
            set_rates(optimizer, Rates(lr=0.1, weight_decay=0.2))
            optimizer.step()
    return {n: (spread[n].full_tensor() - p).detach().abs().max() for n, p in alone.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("world", [2, 3])
def test_muon_over_rows_that_are_spread_is_muon(world: int):
    for found in run_ranks(_spread, world):
        assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("recipe", [LARS, SGD, SGD.model_copy(update={"momentum": 0.0}), OptimizerRecipe(), MUON])
def test_a_checkpoint_carries_the_optimizer(recipe: OptimizerRecipe, steps: int, tmp_path):
    parameters = _parameters()
    optimizer = build_optimizer(parameters, recipe)
    _run(parameters, optimizer, 0, steps)
    writer = CheckpointWriter(tmp_path, rank=0, world=1, attempt="a")
    tensors = {f"model.{n}": p.detach() for n, p in parameters.items()}
    tensors |= optimizer_tensors("optim", optimizer, parameters)
    writer.save(steps, slice_for_rank(tensors, 0, 1), {})
    writer.wait()
    resumed = {n: nn.Parameter(copy.deepcopy(p.detach())) for n, p in parameters.items()}
    fresh = build_optimizer(resumed, recipe)
    load_optimizer("optim", fresh, resumed, open_checkpoint(step_dir(tmp_path, steps)))
    _run(parameters, optimizer, steps, 6)
    _run(resumed, fresh, steps, 6)
    for name, p in parameters.items():
        assert torch.equal(p, resumed[name]), name


def _shares(image: str, **model) -> dict[str, float]:
    """Share of the learning rate of every parameter of a trunk, by name, as the optimizer was built."""
    section = VIT | {"image": image, "image_kwargs": {}, "image_size": 224} | model
    trunk = build_trunk(parse_recipe(recipe_data("s", "r", model=section), "test").model, seed=0)
    optimizer = build_optimizer(dict(trunk.named_parameters()), OptimizerRecipe(layer_decay=0.75))
    set_rates(optimizer, Rates(lr=0.5, weight_decay=0.0))
    rates = {p: group["lr"] / 0.5 for group in optimizer.param_groups for p in group["params"]}
    return {name: rates[p] for name, p in trunk.named_parameters()}


def test_layer_decay_of_a_vit_is_timms():
    kwargs = {"embed_dim": 32, "depth": 5, "num_heads": 2}
    found = _shares("vit_tiny_patch16_224", image_kwargs=kwargs)
    peer = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
    groups = param_groups_layer_decay(peer, layer_decay=0.75)
    theirs = {p: group["lr_scale"] for group in groups for p in group["params"]}
    for name, p in peer.named_parameters():
        assert found[f"image.backbone.{name}"] == pytest.approx(theirs[p]), name
    assert found["image.projection.weight"] == 1


def test_layer_decay_of_resnets_goes_by_stages_as_timms_coarse_groups():
    found = _shares("resnet18")
    peer = timm.create_model("resnet18", num_classes=0)
    stages = group_parameters(peer, peer.group_matcher(coarse=True), reverse=True)
    for name, _ in peer.named_parameters():
        assert found[f"image.backbone.{name}"] == pytest.approx(0.75 ** (4 - stages[name])), name
    clip = _shares("resnet50_clip")
    assert clip["image.backbone.stem.conv1.conv.weight"] == pytest.approx(0.75**4)
    assert clip["image.backbone.stages.0.0.conv1_1x1.conv.weight"] == pytest.approx(0.75**3)
    assert clip["image.backbone.stages.3.2.conv3_1x1.bn.weight"] == clip["image.backbone.head.pos_embed"] == 1


def test_layer_decay_reaches_the_text_tower_and_no_objective():
    found = _shares("vit_tiny_patch16_224", image_kwargs={"depth": 1}, text={"width": 16, "layers": 3, "heads": 2})
    wanted = {
        "token_embedding.weight": 3,
        "positional_embedding": 3,
        "blocks.0.norm1.bias": 2,
        "blocks.1.fc1.weight": 1,
    }
    wanted |= {"blocks.2.qkv.weight": 0, "norm.weight": 0, "projection.weight": 0}
    for name, above in wanted.items():
        assert found[f"text.{name}"] == pytest.approx(0.75**above), name
    objective = {
        "clip.logit_scale": nn.Parameter(torch.zeros(1)),
        "dino.head.layers.0.weight": nn.Parameter(torch.eye(2)),
    }
    groups = build_optimizer(objective, OptimizerRecipe(layer_decay=0.5)).param_groups
    assert {group["lr_scale"] for group in groups} == {1.0}


def test_layer_decay_without_layers_is_refused():
    names = ["image.backbone.conv.weight", "image.backbone.fc.weight"]
    assert set(layer_scales(names, 1.0).values()) == {1.0}
    with pytest.raises(UserError, match="no blocks or stages"):
        layer_scales(names, 0.9)
