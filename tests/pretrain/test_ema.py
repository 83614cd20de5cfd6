"""The running average of the weights: its recursion, resumed bit for bit, at the cost of one copy."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.checkpoint import find_latest, open_checkpoint
from pretrain.checkpoint.layout import step_dirs
from pretrain.distributed.process import Process
from pretrain.models.momentum import FOLLOW, ema_momentum
from pretrain.models.trunk import build_trunk
from pretrain.optim.schedule import Rates
from pretrain.parts import Parts, assemble
from pretrain.recipe import EmaRecipe, ModelRecipe, parse_recipe
from tests.runs import train_here, weights
from tests.tiny import recipe_data, write_recipe, write_shards

MODEL = {"image": "test_resnet", "image_size": 32, "embed_dim": 8, "text": None}
MOCO = {"queue": 24, "dim": 8, "hidden": 16, "momentum": 0.9}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def recipe(shards: Path, folder: Path, name: str, **changes) -> Path:
    changes = {"model": MODEL, "objectives": {"moco": MOCO}, "ema": {"decay": 0.8}} | changes
    return write_recipe(folder / f"{name}.yaml", recipe_data(shards, folder / name, **changes))


def test_the_warm_up_is_tensorflows_rule():
    """https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage, with num_updates = step."""
    warm = EmaRecipe(decay=0.99)
    assert [ema_momentum(warm, step) for step in (0, 1, 8)] == pytest.approx([1 / 10, 2 / 11, 0.5])
    assert (ema_momentum(warm, 889), ema_momentum(warm, 890), ema_momentum(warm, 10**6)) == (890 / 899, 0.99, 0.99)
    assert ema_momentum(EmaRecipe(decay=0.99, warmup=False), 0) == 0.99


@pytest.mark.parametrize("warmup", [True, False])
def test_it_is_the_recursion_over_the_weights_of_every_step(tmp_path, shards, warmup):
    """From the first weights, through those of each checkpoint, in float64; BatchNorm's statistics likewise."""
    changes = {"ema": {"decay": 0.8, "warmup": warmup}, "checkpoint": {"every": 1, "keep_last": 99}}
    assert train_here(recipe(shards, tmp_path, "run", **changes)) == 0
    first = build_trunk(ModelRecipe.model_validate(MODEL), seed=0)
    statistics = {name for name, _ in first.named_buffers()}
    average = {name: t.double() for name, t in first.state_dict().items() if t.is_floating_point()}
    for step, path in sorted(step_dirs(tmp_path / "run" / "checkpoints").items()):
        checkpoint = open_checkpoint(path)
        stays = min(0.8, step / (step + 9)) if warmup else 0.8  # checkpoint n was saved after 0-based step n - 1
        for name, old in average.items():
            m = min(stays, step / (step + FOLLOW)) if name in statistics else stays
            average[name] = m * old + (1 - m) * checkpoint.read(f"model.{name}").double()
            torch.testing.assert_close(checkpoint.read(f"ema.{name}").double(), average[name], rtol=1e-5, atol=1e-6)
    newest = find_latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.step == 8
    trained = [n for n in average if n.endswith("conv1.weight")]
    assert trained
    assert all(not torch.equal(newest.read(f"ema.{n}"), newest.read(f"model.{n}")) for n in trained)
    counters = [n for n in newest.names() if n.startswith("ema.") and n.endswith("num_batches_tracked")]
    assert counters
    assert all(torch.equal(newest.read(n), newest.read("model." + n.removeprefix("ema."))) for n in counters)


@pytest.mark.parametrize("world", [1, 3])
def test_it_resumes_bit_for_bit_beside_a_teacher(tmp_path, shards, world):
    changes = {"world": world, "schedule": {"final": 1.0}}
    for name, steps in (("whole", 6), ("cut", 3), ("cut", 6)):
        train_here(recipe(shards, tmp_path, name, steps=steps, **changes))
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert expected.keys() == found.keys()
    trunk = {n.removeprefix("model.") for n in expected if n.startswith("model.")}
    for of in ("teacher", "ema"):
        assert {n.removeprefix(f"{of}.") for n in expected if n.startswith(f"{of}.")} == trunk
    assert any(not torch.equal(expected[f"ema.{n}"], expected[f"teacher.{n}"]) for n in trunk)
    assert [n for n in expected if not torch.equal(expected[n], found[n])] == []


def live_bytes() -> int:
    """Of all tensors that this process holds."""
    gc.collect()
    plain = (torch.Tensor, nn.Parameter)  # a compiler's fakes have no data
    tensors = [t for t in gc.get_objects() if type(t) in plain]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def updated(shards: Path, ema: dict | None) -> Parts:
    """Parts after one update of an average."""
    data = recipe_data(shards, Path("run"), objectives={"clip": 1.0}, ema=ema)
    parts = assemble(parse_recipe(data, "here"), 60, Process(0, 1, 0, torch.device("cpu")))
    parts.backend.step(Rates(0.0, 0.0))
    parts.backend.update_ema(0)
    return parts


def test_it_costs_one_copy_of_the_trunk(shards):
    before = live_bytes()
    without = updated(shards, None)
    plain = live_bytes()
    averaged = updated(shards, {})
    trunk = sum(t.untyped_storage().nbytes() for t in without.backend.trunk.state_dict().values())
    assert averaged.backend.ema is not None
    assert (live_bytes() - plain) - (plain - before) == trunk
