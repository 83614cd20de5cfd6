"""Steps that are not finite: refused, left out, or gone back from, alike on all ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import find_latest
from pretrain.data import open_data
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.exit_codes import NOT_FINITE, STOPPED
from pretrain.optim.schedule import rates_at
from pretrain.parts import assemble
from pretrain.reader import Reader
from pretrain.recipe import Recipe, load_recipe, parse_recipe
from pretrain.telemetry import read_events
from pretrain.telemetry.spikes import Spikes
from pretrain.train import train as train_loop
from pretrain.views.text import build_tokenizer
from tests.poison import OBJECTIVE
from tests.ranks import run_ranks
from tests.runs import losses, train, train_here, weights
from tests.tiny import RESNET, recipe_data, write_recipe, write_shards

SWAV = {"crops": [[2, None, [0.3, 1.0]]], "prototypes": 6, "dim": 4, "hidden": 8, "queue": 24, "freeze_steps": 1}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def poisoned(shards: Path, output: Path, sample: int, **changes) -> dict:
    """BatchNorm, a queue and dropout: everything that a step leaves behind."""
    objectives = {"tests.poison": {"sample": sample}, "swav": SWAV}
    return recipe_data(shards, output, **{"model": RESNET, "objectives": objectives} | changes)


def sample_of(shards: Path, step: int) -> int:
    """A sample that is seen at 0-based `step`, at the end of the global batch: on the last rank."""
    _, order = open_data(parse_recipe(recipe_data(shards, Path("nowhere")), "here"))
    return int(order.batch(step).ids[-1])


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("world", [1, 3])
def test_a_step_left_out_leaves_nothing_behind(tmp_path, shards, world):
    bad = 3
    changes = {"faults": {"nan": "skip"}, "world": world, "checkpoint": {"every": 2, "keep_last": 10}}
    data = poisoned(shards, tmp_path / "run", sample_of(shards, bad), **changes)
    recipe = write_recipe(tmp_path / "r.yaml", data)
    train(str(recipe))
    events = [e for e in read_events(tmp_path / "run") if e["event"] == "left-out"]
    assert [e["step"] for e in events] == [bad + 1]
    straight = weights(tmp_path / "run")
    if world == 1:  # the same without that step, by hand
        assert not differing(by_hand(load_recipe(recipe), without=bad), straight)
    for step in (4, 6, 8):  # and again from the step before it
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    train(str(recipe), "checkpoint.lost=8")
    assert not differing(straight, weights(tmp_path / "run"))


def by_hand(recipe: Recipe, without: int) -> dict[str, torch.Tensor]:
    """Weights and state of a run that never sees step `without`."""
    sources, order = open_data(recipe)
    process = Process(0, 1, 0, torch.device("cpu"))
    parts = assemble(recipe, order.samples, process)
    total = recipe.total_steps(order.samples)
    with Reader(
        sources, order, parts.joint.image_views(recipe.model.image_size), parts.joint.text_views(),
        build_tokenizer(recipe.model.text), seed=recipe.seed,
    ) as reader:  # fmt: skip
        for batch in reader.stream(0, total):
            if batch.step != without:
                assert parts.step(batch.to("cpu"), rates_at(batch.step, total, recipe)).grad_norm is not None
    return {f.name: f.data.reshape(f.shape) for f in parts.fragments()}


@pytest.mark.parametrize("world", [1, 3])
def test_a_rewound_run_is_one_that_never_had_the_data(tmp_path, shards, world):
    bad = 3  # the newest checkpoint is of step 2
    changes = {"faults": {"nan": "rewind"}, "world": world}
    data = poisoned(shards, tmp_path / "run", sample_of(shards, bad), **changes)
    recipe = write_recipe(tmp_path / "r.yaml", data)
    train(str(recipe))
    skips = json.loads((tmp_path / "run" / "skips.json").read_text())
    assert [(s["from_step"], s["skip"]) for s in skips] == [(2, 2)]
    segments = {"sources": [str(shards)], "segments": [{"from_step": 2, "skip": 2}]}
    never = data | {"output": str(tmp_path / "never"), "data": segments}
    train(str(write_recipe(tmp_path / "never.yaml", never)))
    assert not differing(weights(tmp_path / "run"), weights(tmp_path / "never"))
    assert losses(tmp_path / "run") == losses(tmp_path / "never")
    if world == 1:  # the user's recipe says nothing of it, and the same command goes on
        assert train_here(recipe, "steps=10") == 0
        assert find_latest(tmp_path / "run" / "checkpoints").step == 10


def test_a_signal_in_the_very_step_that_is_gone_back_from_is_handed_on(tmp_path, shards, monkeypatch):
    """A job's handler, which has it put back into the queue, is called once the next start has saved for it."""
    handed_on, loss = [], OBJECTIVE.loss

    def warned(self, features, batch, group):
        if (batch.ids == self.options.sample).any() and not handed_on:
            os.kill(os.getpid(), signal.SIGUSR2)
        return loss(self, features, batch, group)

    monkeypatch.setattr(OBJECTIVE, "loss", warned)
    data = poisoned(shards, tmp_path / "run", sample_of(shards, 3), faults={"nan": "rewind"})
    recipe = write_recipe(tmp_path / "r.yaml", data)
    before = signal.signal(signal.SIGUSR2, lambda number, frame: handed_on.append((number, frame)))
    try:
        assert train_here(recipe) == STOPPED
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert handed_on == [(signal.SIGUSR2, None)]
    assert [e["event"] for e in read_events(tmp_path / "run")][-2:] == ["save", "stop"]


def in_the_loss_of_one_rank(rank: int, world: int, shards: str, folder: str, sample: int) -> dict[str, list]:
    """How runs of every precision and policy end on this rank: 0 or the exit code, and what was said."""
    process, found = Process(rank, world, rank, torch.device("cpu")), {}
    objectives = {"tests.poison": {"sample": sample, "alone": True}}
    for precision in ("fp32", "fp16"):
        for nan in ("raise", "skip", "rewind"):
            run = Path(folder) / f"{precision} {nan}"
            changes = {"precision": precision, "faults": {"nan": nan}, "steps": 4, "objectives": objectives}
            try:
                ended = train_loop(parse_recipe(recipe_data(Path(shards), run, **changes), "test"), process)
                found[run.name] = [int(not ended), ""]
            except UserError as error:
                found[run.name] = [error.exit_code, str(error)]
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_a_loss_that_is_nan_on_one_rank_alone_is_so_on_all(tmp_path, shards, world):
    bad = 3
    ranks = run_ranks(in_the_loss_of_one_rank, world, str(shards), str(tmp_path), sample_of(shards, bad))
    assert all(found == ranks[0] for found in ranks)
    for precision in ("fp32", "fp16"):
        code, told = ranks[0][f"{precision} raise"]
        assert code == NOT_FINITE
        assert told.startswith(f"step {bad + 1}: loss nan, gradient norm ")
        assert ranks[0][f"{precision} skip"] == ranks[0][f"{precision} rewind"] == [0, ""]
        events = read_events(tmp_path / f"{precision} skip")
        assert [e["step"] for e in events if e["event"] == "left-out"] == [bad + 1]
        assert [e["step"] for e in read_events(tmp_path / f"{precision} rewind") if e["event"] == "non-finite"] == [4]
        assert not [e for e in events if e["event"] == "overflow" and e["step"] == bad + 1]


def test_too_many_are_refused(tmp_path, shards, capsys):
    everywhere = {"optimizer": {"lr": 1e18}, "model": RESNET}
    for nan, told in (
        ("skip", "faults.max_nan=2 steps of this run were left"),
        ("rewind", "Rewound faults.max_nan=2 times already"),
    ):
        data = recipe_data(shards, tmp_path / nan, faults={"nan": nan, "max_nan": 2}, **everywhere)
        assert train_here(write_recipe(tmp_path / f"{nan}.yaml", data)) == NOT_FINITE
        assert told in capsys.readouterr().err
        assert json.loads((tmp_path / nan / "run.json").read_text())[-1]["ended"] == "refused"  # no crash


def test_a_spike_is_told_from_the_median_and_its_samples_are_kept(tmp_path, shards):
    watch = Spikes(factor=5, window=10)
    calm = [watch.seen(1 + 0.01 * (i % 3)) for i in range(20)]
    assert not any(calm)
    assert watch.seen(float("nan")) is None
    assert watch.seen(1.04) is None
    assert watch.seen(2.0)["median"] == pytest.approx(1.01)
    data = recipe_data(shards, tmp_path / "run", steps=30, faults={"spike": 1e-6, "spike_window": 10})
    assert train_here(write_recipe(tmp_path / "r.yaml", data)) == 0
    spikes = [json.loads(line) for line in (tmp_path / "run" / "spikes.jsonl").read_text().splitlines()]
    logged = losses(tmp_path / "run")
    _, order = open_data(load_recipe(tmp_path / "r.yaml"))
    assert spikes
    for spike in spikes:
        assert spike["loss"] == pytest.approx(logged[spike["step"]])
        assert [i for _, i in spike["samples"]] == order.batch(spike["step"] - 1).ids.tolist()
