"""Compute options: gradients, draws, statistics and names are those of the plain towers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.backend_names import BACKENDS
from pretrain.backends import build_backend, zero
from pretrain.check.memory import SavedBytes
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.models import compute
from pretrain.models.request import FeatureRequest, RegionInput
from pretrain.models.trunk import Trunk
from pretrain.parts import build_modules
from pretrain.probe import probe_inputs
from pretrain.recipe import Recipe, parse_recipe
from tests.ranks import run_ranks
from tests.tiny import RESNET, VIT, recipe_data

CPU = torch.device("cpu")
DEEP = {"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": 8}
DROPPING = VIT["text"] | {"dropout": 0.2}
PYRAMID = VIT | {"image": "vit_base_patch32_clip_224", "image_size": 32, "image_kwargs": DEEP}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dropping": (VIT | {"image_kwargs": VIT["image_kwargs"] | {"proj_drop_rate": 0.2}, "text": DROPPING}, {}),
    "patch-dropout": (PYRAMID | {"patch_dropout": 0.5}, {}),
    "locked": (VIT | {"lock": {"image": True, "image_unlocked": 1}}, {}),
    "resnet": (RESNET, {}),
    "regions": (PYRAMID | {"leff": 1, "regions": {}}, {"pyramid_clip": 1.0}),
    "convnext": (VIT | {"image": "test_convnext", "image_size": 32, "image_kwargs": {}}, {}),
}


def built(name: str, world: int = 1, **changes: Any) -> tuple[Recipe, Trunk, Any]:
    model, objectives = MODELS[name]
    data = recipe_data("s", "r", model=model, objectives=objectives or {"clip": 1.0}, **changes)
    recipe = parse_recipe(data, "test")
    trunk, joint, _ = build_modules(recipe, 60, 0, world)
    return recipe, trunk, joint


def inputs_of(joint: Any, recipe: Recipe, seed: int, tokens: int = 9) -> dict[FeatureRequest, Any]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(x: Any) -> Any:
        if isinstance(x, RegionInput):
            return x._replace(images=drawn(x.images))
        if x.is_meta:
            return torch.randint(0, 255, x.shape, dtype=torch.uint8, generator=generator)
        return x

    return {request: drawn(x) for request, x in probe_inputs(joint, recipe, tokens).items()}


def gradients(trunk: nn.Module, inputs: dict, forward: Callable | None = None) -> dict[str, Tensor]:
    """Of a fixed mixture of all features; the draws are those of one seed."""
    torch.manual_seed(7)
    features = (forward or trunk)(inputs)
    generator = torch.Generator().manual_seed(3)
    total = sum((f * torch.randn(f.shape, generator=generator).to(f)).sum() for f in features.values())
    assert isinstance(total, Tensor)
    total.backward()
    found = {n: p.grad for n, p in trunk.named_parameters() if p.grad is not None}
    trunk.zero_grad()
    return found


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], within: float) -> None:
    assert found.keys() == wanted.keys()
    for name, g in wanted.items():
        scale = max(1.0, g.abs().max().item())
        assert (found[name] - g).abs().max().item() <= within * scale, name


@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_blocks_give_the_same_gradients_statistics_and_names(name):
    recipe, trunk, joint = built(name)
    inputs = inputs_of(joint, recipe, 0)
    plain, again = trunk.double(), copy.deepcopy(trunk.double())
    compute.checkpoint_blocks(again)
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert_close(gradients(again, inputs), gradients(plain, inputs), 1e-12)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0, msg=key)


def test_checkpointed_blocks_keep_less(monkeypatch):
    monkeypatch.setitem(MODELS, "deep", (PYRAMID | {"image_kwargs": DEEP | {"depth": 8}, "image_size": 64}, {}))
    recipe, trunk, joint = built("deep")
    inputs = inputs_of(joint, recipe, 0)

    def kept() -> int:
        with SavedBytes([*trunk.parameters(), *trunk.buffers()]) as saved:
            trunk({r: x for r, x in inputs.items() if r.tower == "image"})
        return saved.bytes()

    before = kept()
    compute.checkpoint_blocks(trunk)
    assert kept() < before / 8


def test_a_copy_runs_its_own_weights():
    _, trunk, _ = built("dropping")
    compute.compile_blocks(trunk)
    compute.checkpoint_blocks(trunk)
    teacher = copy.deepcopy(trunk).eval()
    for mine, its in zip(compute.all_units(teacher), compute.all_units(trunk)):
        (block, inner, _), (its_block, _, _) = mine.forward.args, its.forward.args
        assert block is inner.args[0] is mine
        assert its_block is its


def test_blocks_are_found_inside_stages():
    _, trunk, _ = built("convnext")
    assert {type(u).__name__ for u in compute.units(trunk.image.backbone)} == {"ConvNeXtBlock"}
    _, trunk, _ = built("resnet")
    assert {type(u).__name__ for u in compute.units(trunk.image.backbone)} == {"BasicBlock", "Bottleneck"}


def of_backends(rank: int, world: int) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Gradients with and without checkpointing, by model and backend; SyncBatchNorm's statistics beside them."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    process = Process(rank, world, rank, CPU)
    zero.KEPT_WHOLE = 0  # else nothing of towers so small would be partitioned
    for name in ("dropping", "resnet"):
        for backend in BACKENDS:
            for again in (False, True):
                recipe, trunk, joint = built(name, world, backend=backend, compute={"checkpoint_blocks": again})
                compute.apply(trunk, recipe, CPU)
                engine = build_backend(trunk, recipe, process)
                torch.manual_seed(rank)
                features = engine.forward(inputs_of(joint, recipe, rank))
                engine.backward(list(features.values()), [f.detach().sign() for f in features.values()])
                kept = engine.gradients() | {n: b.clone() for n, b in trunk.named_buffers() if "running" in n}
                found.setdefault(f"{name} {backend}", {})[str(again)] = kept
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_backends_give_the_same_gradients(world):
    for found in run_ranks(of_backends, world):
        for case, by in found.items():
            assert by["True"], case
            assert_close(by["True"], by["False"], 1e-5)
            assert_close(by["True"], found[f"{case.split()[0]} ddp"]["False"], 1e-5)


ONE = VIT | {
    "image_kwargs": {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8, "proj_drop_rate": 0.2},
    "text": DROPPING | {"layers": 1},
}


def compiled(rank: int, world: int) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Gradients with and without compiled blocks, by backend."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    process = Process(rank, world, rank, CPU)
    MODELS["one"] = (ONE, {})
    zero.KEPT_WHOLE = 0
    for backend in ("ddp", "fsdp2", "zero3"):
        for compile in (False, True):
            recipe, trunk, joint = built("one", world, backend=backend, compute={"compile": compile})
            compute.apply(trunk, recipe, CPU)
            engine = build_backend(trunk, recipe, process)
            torch.manual_seed(rank)
            features = engine.forward(inputs_of(joint, recipe, rank))
            engine.backward(list(features.values()), [f.detach().sign() for f in features.values()])
            found.setdefault(backend, {})[str(compile)] = engine.gradients()
    return found


@pytest.mark.timeout(600)
def test_compiled_blocks_under_every_way_to_spread_weights():
    for found in run_ranks(compiled, 2):
        for backend, by in found.items():
            assert_close(by["True"], by["False"], 1e-5)
            assert_close(by["True"], found["ddp"]["False"], 1e-5)
            assert by["True"], backend


def test_compiled_blocks_give_the_same_gradients(monkeypatch):
    monkeypatch.setitem(MODELS, "one", (ONE, {}))
    recipe, trunk, joint = built("one")
    plain = copy.deepcopy(trunk)
    compute.compile_blocks(trunk)
    compute.checkpoint_blocks(trunk)
    assert [n for n, _ in trunk.named_parameters()] == [n for n, _ in plain.named_parameters()]
    for tokens in (9, 5):
        inputs = inputs_of(joint, recipe, 0, tokens)
        assert_close(gradients(trunk, inputs), gradients(plain, inputs), 1e-5)


def test_no_compiler_is_told(monkeypatch):
    import torch._inductor.config as config

    recipe, trunk, _ = built("dropping", compute={"compile": True})
    monkeypatch.setattr(config.cpp, "cxx", ("/nowhere/g++",))
    torch._dynamo.reset()
    with pytest.raises(UserError, match=r"cannot compile on cpu.*C\+\+ compiler"):
        compute.apply(trunk, recipe, CPU)


def test_what_cannot_be_compiled_is_refused():
    recipe, trunk, _ = built("resnet", world=2, compute={"compile": True})
    with pytest.raises(UserError, match="sync_batchnorm: false"):
        compute.apply(trunk, recipe, CPU)


@pytest.mark.parametrize("kernel", ["flash", "math"])
def test_attention_kernels_give_the_same_gradients(kernel):
    recipe, trunk, joint = built("dropping", compute={"attention": kernel, "checkpoint_blocks": True})
    inputs = inputs_of(joint, recipe, 0)
    wanted = gradients(copy.deepcopy(trunk), inputs)
    try:
        compute.apply(trunk, recipe, CPU)
        assert torch.backends.cuda.flash_sdp_enabled() == (kernel == "flash")
        assert_close(gradients(trunk, inputs), wanted, 1e-5)
    finally:
        compute.use_attention("auto")


@pytest.mark.parametrize("kernel", ["efficient", "cudnn"])
def test_a_kernel_that_is_not_here_is_refused_before_the_first_step(kernel):
    recipe, trunk, _ = built("dropping", compute={"attention": kernel})
    with pytest.raises(UserError, match=f"compute.attention: {kernel} does not run on cpu for the image tower"):
        compute.apply(trunk, recipe, CPU)
    assert torch.backends.cuda.math_sdp_enabled()


def test_channels_last_is_an_option():
    recipe, trunk, joint = built("resnet", compute={"channels_last": False})
    inputs = inputs_of(joint, recipe, 0)
    trunk.double()
    kernel: Any = trunk.image.backbone.layer1[0].conv1.weight
    assert not kernel.is_contiguous()
    wanted = gradients(copy.deepcopy(trunk), inputs)
    compute.apply(trunk, recipe, CPU)
    assert kernel.is_contiguous()
    assert_close(gradients(trunk, inputs), wanted, 1e-12)
