"""FSDP2: that it is what runs, that it trains as DDP and one process do, and that its checkpoints are everyone's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from pretrain.backends import check_combination
from pretrain.checkpoint import CheckpointWriter, open_checkpoint, step_dir
from pretrain.distributed.process import Process
from pretrain.distributed.shards import whole
from pretrain.errors import UserError
from pretrain.optim.schedule import Rates
from pretrain.parts import Parts, assemble
from pretrain.recipe import parse_recipe
from pretrain.views.regions import Regions
from tests.pretrain.test_objective_steps import CROPS, MODEL, PATCHES, ROWS, SAMPLES, global_batch
from tests.ranks import run_ranks
from tests.runs import losses, train_here
from tests.tiny import RESNET, VIT, recipe_data, write_recipe, write_shards

SWAV = {"crops": CROPS, "prototypes": 12, "hidden": 10, "dim": 6, "freeze_steps": 1}
MOCO = {"queue": 2 * ROWS, "dim": 6, "hidden": 10, "momentum": 0.9}
BATCHNORM = RESNET | {"image_kwargs": {}}
CASES: dict[str, dict[str, Any]] = {
    "clip": {"model": VIT, "ema": {"decay": 0.8}, "optimizer": {"clip_norm": 0.5}},
    "swav and batchnorm": {"model": BATCHNORM, "objectives": {"swav": SWAV}, "optimizer": {"name": "sgd"}},
    "lars": {"model": MODEL, "objectives": {"swav": SWAV}, "optimizer": {"name": "lars", "lr": 0.1}},
    "moco, weights in host memory": {"model": MODEL, "objectives": {"moco": MOCO}, "sharding": {"offload": True}},
    "dino, weights kept whole for the backward": {
        "model": MODEL,
        "objectives": {"dino": {"crops": CROPS, "prototypes": 12, "hidden": 10, "bottleneck": 6}},
        "sharding": {"reshard_after_forward": False},
    },
    "pyramid_clip": {"model": PATCHES, "objectives": {"pyramid_clip": 1.0}},
    "locked backbone, two micro-steps": {"model": VIT | {"lock": {"image": True}}, "accumulation": 2},
    "last block open, four micro-steps, blocks run again": {
        "model": VIT | {"lock": {"image": True, "image_unlocked": 1}},
        "accumulation": 4,
        "compute": {"checkpoint_blocks": True},
    },
}
FEW = [name for i, name in enumerate(CASES) if i in (0, 1, 3, 5, 6)]
STEPS = 3


def built(rank: int, world: int, backend: str, changes: dict[str, Any], dtype: torch.dtype, at: str = "") -> Parts:
    recipe = parse_recipe(recipe_data("shards", "run", global_batch=ROWS, backend=backend, **changes), "test")
    torch.set_default_dtype(dtype)  # so that every part is made in it
    try:
        checkpoint = open_checkpoint(at) if at else None
        return assemble(recipe, SAMPLES, Process(rank, world, 0, torch.device("cpu")), checkpoint)
    finally:
        torch.set_default_dtype(torch.float32)


def trained(parts: Parts, rank: int, world: int, first: int = 0, last: int = STEPS) -> list[list[float]]:
    """(loss, gradient norm) of every step."""
    found = []
    for step in range(first, last):
        batch, rows = global_batch(parts, step), ROWS // world
        dtype = next(parts.backend.trunk.parameters()).dtype
        batch.weight = batch.weight.to(dtype)
        batch.regions = {n: Regions(r.boxes.to(dtype), r.features, r.mask) for n, r in batch.regions.items()}
        mine = batch.rows(rank * rows, (rank + 1) * rows)
        if step == first and world > 1:
            parts.backend.warm_up(parts.two_stage.inputs(mine.rows(0, rows // parts.two_stage.accumulation)))
        result = parts.step(mine, Rates(parts.backend.recipe.optimizer.lr, 0.1))
        found.append([float(result.loss), float(result.grad_norm)])
    return found


def state(parts: Parts) -> dict[str, torch.Tensor]:
    """All that is saved of the trunk and its copies, whole."""
    kept = parts.backend.weights()
    return {f"{of}.{n}": whole(t).detach().clone() for of, trunk in kept.items() for n, t in trunk.state_dict().items()}


def run(rank: int, world: int, backend: str, changes: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    parts = built(rank, world, backend, changes, dtype)
    if backend == "fsdp2":
        check_sharded(parts)
    return {"steps": trained(parts, rank, world), "state": state(parts), "is": parts.backend.describe()}


def check_sharded(parts: Parts) -> None:
    """Types, placements and sizes of what this rank holds of the trunk and its copies."""
    for trunk in parts.backend.weights().values():
        assert isinstance(trunk, FSDPModule)
        assert sum(isinstance(m, FSDPModule) for m in trunk.modules()) > 2  # blocks by themselves
        parameters = list(trunk.parameters())
        assert all(isinstance(p, DTensor) and p.placements[-1] == Shard(0) for p in parameters)
        held = sum(p.to_local().untyped_storage().nbytes() for p in parameters)
        total = sum(p.numel() * p.element_size() for p in parameters)
        assert (
            held < total / parameters[0].device_mesh.shape[-1] * 1.3
        )  # rows are dealt whole, and padded to the first rank's


def cases(rank: int, world: int, names: list[str]) -> dict[str, Any]:
    return {name: run(rank, world, "fsdp2", CASES[name], torch.float64) for name in names}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    whole_weights = {name: {k: v for k, v in case.items() if k != "sharding"} for name, case in CASES.items()}
    return {name: run(0, 1, "ddp", changes, torch.float64) for name, changes in whole_weights.items()}


@pytest.mark.parametrize("world", [2, 3])
def test_it_trains_as_one_process_does(world, expected):
    """Losses, norms, weights, teacher and average of some steps in float64, where nothing hides."""
    for rank in run_ranks(cases, world, FEW if world == 2 else list(CASES)):
        for name, found in rank.items():
            assert found["is"].startswith(f"FSDP2 on {world} x cpu, "), name
            torch.testing.assert_close(
                torch.tensor(found["steps"]), torch.tensor(expected[name]["steps"]), rtol=1e-10, atol=1e-10, msg=name
            )
            assert found["state"].keys() == expected[name]["state"].keys()
            for n, tensor in expected[name]["state"].items():
                torch.testing.assert_close(found["state"][n], tensor, rtol=1e-9, atol=1e-9)


def hybrid(rank: int, world: int) -> dict[str, Any]:
    """Two copies of two ranks each."""
    found = run(rank, world, "fsdp2", CASES["clip"] | {"sharding": {"within": 2}, "accumulation": 2}, torch.float64)
    with pytest.raises(UserError, match=r"within 3 does not divide the world of 4 ranks; take one of 1, 2, 4"):
        built(rank, world, "fsdp2", {"sharding": {"within": 3}}, torch.float32)
    return found


def test_groups_of_ranks_hold_replicas(expected):
    for rank in run_ranks(hybrid, 4):
        assert rank["is"].startswith("FSDP2 on 4 x cpu (2 copies over 2 ranks each), ")
        torch.testing.assert_close(rank["steps"], expected["clip"]["steps"], rtol=1e-10, atol=1e-10)
        for n, tensor in expected["clip"]["state"].items():
            torch.testing.assert_close(rank["state"][n], tensor, rtol=1e-9, atol=1e-9)


KEPT = {"model": BATCHNORM | {"text": None}, "objectives": {"moco": MOCO}, "ema": {"decay": 0.8}}
"""All that a checkpoint can hold: statistics, a teacher, an average, a queue."""


def save(parts: Parts, rank: int, world: int, folder: str, step: int = 2) -> str:
    writer = CheckpointWriter(Path(folder), rank=rank, world=world, attempt="a1")
    writer.save(step, parts.fragments(), {})
    writer.wait()
    torch.distributed.barrier()
    return str(step_dir(Path(folder), step))


def saved_and_resumed(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Straight through; cut after two steps; from DDP's checkpoint, and DDP from FSDP2's."""
    found = {}
    for backend in ("fsdp2", "ddp"):
        straight = built(rank, world, backend, KEPT, torch.float32)
        trained(straight, rank, world, 0, 4)
        cut = built(rank, world, backend, KEPT, torch.float32)
        trained(cut, rank, world, 0, 2)
        at = save(cut, rank, world, f"{folder}/{backend}")
        found[backend] = state(straight)
        for reader in ("fsdp2", "ddp"):
            resumed = built(rank, world, reader, KEPT, torch.float32, at)
            trained(resumed, rank, world, 2, 4)
            found[f"{backend} to {reader}"] = state(resumed)
    two = built(rank, world, "fsdp2", KEPT | {"sharding": {"within": 1}}, torch.float32, at)
    save(two, rank, world, f"{folder}/replicas")
    return found


def test_a_checkpoint_is_everyones_and_a_resume_exact(tmp_path):
    """World 3, where the order of a sum shows in its last bits."""
    for rank in run_ranks(saved_and_resumed, 3, str(tmp_path)):
        for backend in ("fsdp2", "ddp"):
            for n, tensor in rank[backend].items():
                assert torch.equal(rank[f"{backend} to {backend}"][n], tensor), (backend, n)
                for reader in ("fsdp2", "ddp"):
                    torch.testing.assert_close(rank[f"{backend} to {reader}"][n], tensor, rtol=1e-4, atol=1e-5)
    ours, theirs = (open_checkpoint(step_dir(tmp_path / backend, 2)) for backend in ("fsdp2", "ddp"))
    assert ours.names()
    assert sorted(ours.names()) == sorted(theirs.names())
    for n in ours.names():
        torch.testing.assert_close(ours.read(n), theirs.read(n), rtol=1e-4, atol=1e-5)
    # replicas share the writing among them: nothing twice, nothing changed
    copied = open_checkpoint(step_dir(tmp_path / "replicas", 2))
    assert all(torch.equal(copied.read(n), theirs.read(n)) for n in theirs.names())
    # one process goes on from what three wrote
    alone = built(0, 1, "ddp", KEPT, torch.float32, str(ours.path))
    trained(alone, 0, 1, 2, 4)
    for n, tensor in state(alone).items():
        torch.testing.assert_close(tensor, rank["fsdp2"][n], rtol=1e-3, atol=1e-4)


def rounded(rank: int, world: int) -> dict[str, Any]:
    """Losses where bf16 is in the towers or, with muon, in the optimizer."""
    kinds = {n: {"precision": n} for n in ("fp32", "bf16")} | {"muon": {"optimizer": {"name": "muon"}}}
    curves = {}
    for backend in ("ddp", "fsdp2"):
        for kind, changes in kinds.items():
            parts = built(rank, world, backend, CASES["clip"] | changes, torch.float32)
            curves[f"{backend} {kind}"] = [loss for loss, _ in trained(parts, rank, world)]
    return curves


def test_low_precision_is_autocasts_and_muon_turns_whole_matrices():
    for curves in run_ranks(rounded, 2):
        assert curves["fsdp2 muon"] == pytest.approx(curves["ddp muon"], rel=1e-4)
        assert curves["fsdp2 fp32"] == pytest.approx(curves["ddp fp32"], rel=1e-6)
        assert curves["fsdp2 bf16"] == pytest.approx(curves["ddp bf16"], rel=2e-3)
        assert curves["fsdp2 bf16"] != pytest.approx(curves["fsdp2 fp32"], rel=1e-5)


def test_what_cannot_be_right_is_refused_by_name():
    changes = {"backend": "fsdp2", "optimizer": {"name": "lars"}, "sharding": {"offload": True}}
    with pytest.raises(UserError, match=r"optimizer lars .* sharding\.offload=false"):
        check_combination(parse_recipe(recipe_data("shards", "run", **changes), "test"))


def test_one_process_alone_trains_the_same(tmp_path):
    shards = write_shards(tmp_path / "shards")
    for backend in ("ddp", "fsdp2"):
        data = recipe_data(shards, tmp_path / backend, backend=backend, steps=3)
        assert train_here(write_recipe(tmp_path / f"{backend}.yaml", data)) == 0
    assert losses(tmp_path / "fsdp2") == pytest.approx(losses(tmp_path / "ddp"), rel=1e-6)


@pytest.mark.parametrize(("key", "value"), [("within", 2), ("offload", True), ("reshard_after_forward", False)])
def test_what_another_backend_would_not_do_is_refused(key, value):
    changes = {"backend": "ddp", "sharding": {key: value}}
    with pytest.raises(UserError, match=rf"sharding\.{key}: {value} means nothing to backend ddp"):
        check_combination(parse_recipe(recipe_data(Path("shards"), Path("run"), **changes), "here"))
