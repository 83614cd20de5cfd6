"""Whole runs of the self-supervised objectives together: killed, resumed, on another world, replayed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import find_latest
from pretrain.replay import replay
from pretrain.telemetry import read_events, read_log
from tests.runs import kill_and_resume, losses, train, train_here, weights
from tests.tiny import VIT, recipe_data, write_recipe, write_shards

CROPS = [[2, None, [0.3, 1.0]], [2, 24, [0.1, 0.3]]]
MODEL = {"image": "test_resnet", "image_size": 32, "embed_dim": 8, "text": None}
SWAV = {"crops": CROPS, "prototypes": 12, "hidden": 16, "dim": 8, "freeze_steps": 2, "queue": 24}
MOCO = {"queue": 36, "dim": 8, "hidden": 16, "momentum": 0.99}
DINO = {"crops": CROPS, "prototypes": 20, "hidden": 16, "bottleneck": 8, "freeze_steps": 2}
HYDRA = {"classes": 3, "dim": 8, "hidden": 16, "gate_width": 8, "gate_hidden": 8}
ALL = {"swav": SWAV, "moco": MOCO, "hydra": HYDRA | {"weight": {"start": 0.1, "end": 1.0, "to_step": 6}}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def recipe(shards: Path, folder: Path, name: str, **changes) -> Path:
    changes = {"model": MODEL, "objectives": ALL} | changes
    return write_recipe(folder / f"{name}.yaml", recipe_data(shards, folder / name, **changes))


@pytest.mark.parametrize(
    "optimizer", [{"name": "adamw", "lr": 1e-3}, {"name": "sgd", "lr": 0.01}], ids=["adamw", "sgd"]
)
def test_every_optimizers_state_resumes_bit_for_bit(tmp_path, shards, optimizer):
    """On a convolutional tower: its weights do not lie in memory as the checkpoint has them."""
    changes = {"schedule": {"final": 1.0}, "optimizer": optimizer}
    assert train_here(recipe(shards, tmp_path, "whole", steps=6, **changes)) == 0
    for steps in (3, 6):
        assert train_here(recipe(shards, tmp_path, "cut", steps=steps, **changes)) == 0
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert [n for n in expected if not torch.equal(expected[n], found[n])] == []


@pytest.mark.parametrize("world", [1, 3])
def test_queues_teachers_and_prototypes_resume_bit_for_bit(tmp_path, shards, world):
    changes = {"world": world, "steps": 10, "optimizer": {"name": "lars", "lr": 0.1, "exclude_vectors": False}}
    train(str(recipe(shards, tmp_path, "whole", **changes)))
    kill_and_resume(recipe(shards, tmp_path, "cut", **changes), tmp_path / "cut")
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert expected.keys() == found.keys()
    assert any(n.startswith("teacher.") for n in expected)
    assert any(n.endswith("swav.queue.held") for n in expected)
    assert [n for n in expected if not torch.equal(expected[n], found[n])] == []
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_another_world_goes_on_with_the_same_queues_and_losses(tmp_path, shards):
    """Saved by three ranks; the next step on one, two and three is the same, and so is what the queues then hold."""
    changes = {"schedule": {"final": 1.0}, "objectives": ALL | {"hydra": HYDRA}}
    train(str(recipe(shards, tmp_path, "three", world=3, steps=4, **changes)))
    next_loss, next_queue = {}, {}
    for world in (1, 2, 3):
        name = f"on{world}"
        shutil.copytree(tmp_path / "three" / "checkpoints", tmp_path / name / "checkpoints")
        train(str(recipe(shards, tmp_path, name, world=world, steps=5, **changes)))
        next_loss[world] = losses(tmp_path / name)[5]
        next_queue[world] = weights(tmp_path / name)["objective.swav.queue.held"]
    assert next_loss[2] == pytest.approx(next_loss[1], rel=1e-4)
    assert next_loss[3] == pytest.approx(next_loss[1], rel=1e-4)
    assert next_queue[1].any(-1).all()
    for world in (2, 3):
        torch.testing.assert_close(next_queue[world], next_queue[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "objectives", [{"swav": SWAV}, {"dino": DINO}, {"siglip": 1.0}, ALL], ids=["swav", "dino", "siglip", "all"]
)
def test_replay_gives_the_loss_that_was_logged(tmp_path, shards, objectives):
    """With queue, teacher, photometrics and the batch statistics of two ranks."""
    model = MODEL | {"text": VIT["text"]} if "siglip" in objectives else MODEL
    train(str(recipe(shards, tmp_path, "run", world=2, model=model, objectives=objectives, steps=7)))
    logged = {line["step"]: line["loss"] for line in read_log(tmp_path / "run")}
    replayed = replay(tmp_path / "run", 7)
    assert replayed.weights_of == 6
    assert float(replayed.total().mean()) == pytest.approx(logged[7], rel=1e-4)


def test_a_known_failure_is_warned_of_once(tmp_path, shards):
    """Predictions so soft that they can only be uniform."""
    soft = SWAV | {"temperature": 1e4, "queue": 0, "freeze_steps": 0, "crops": [[2, 16, [0.3, 1.0]]]}
    assert train_here(recipe(shards, tmp_path, "run", objectives={"swav": soft}, steps=204, log={"every": 1})) == 0
    warnings = [e["message"] for e in read_events(tmp_path / "run") if e["event"] == "warning"]
    assert [w for w in warnings if "stays at ln(prototypes)" in w] == warnings[-1:]


def test_two_teachers_of_different_speed_are_refused(tmp_path, shards, capsys):
    assert train_here(recipe(shards, tmp_path, "run", objectives={"moco": MOCO, "dino": DINO})) == 2
    assert "one momentum teacher" in capsys.readouterr().err


def test_teachers_that_part_later_on_are_refused_before_the_first_step(tmp_path, shards, capsys):
    objectives = {"moco": MOCO | {"momentum": 0.996}, "dino": DINO}
    assert train_here(recipe(shards, tmp_path, "run", objectives=objectives)) == 2
    assert "one momentum teacher" in capsys.readouterr().err
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_queue_that_is_no_whole_number_of_batches_is_refused(tmp_path, shards, capsys):
    assert train_here(recipe(shards, tmp_path, "run", objectives={"swav": SWAV | {"queue": 30}})) == 2
    assert "try 24 or 36" in capsys.readouterr().err


def test_signals_of_every_objective_are_logged(tmp_path, shards):
    assert train_here(recipe(shards, tmp_path, "run", steps=4)) == 0
    line = read_log(tmp_path / "run")[-1]
    for name in ("swav/dead_prototypes", "swav/loss_over_chance", "moco/accuracy", "hydra/gate_entropy", "loss/hydra"):
        assert name in line
    assert any(name.startswith("rankme/") and name.endswith(".pooled") for name in line)
    assert find_latest(tmp_path / "run" / "checkpoints").step == 4
