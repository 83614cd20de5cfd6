"""Replay: the batch, the crops and the losses of a step, from the run's folder alone."""

from __future__ import annotations

import pytest

from pretrain.__main__ import main
from pretrain.errors import UserError
from pretrain.replay import replay, write_page
from pretrain.telemetry import read_log
from tests.ranks import run_ranks
from tests.tiny import RESNET, VIT, recipe_data, write_recipe, write_shards


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    data = recipe_data(write_shards(folder / "shards"), folder / "run", model=VIT, accumulation=2, steps=6)
    assert main([str(write_recipe(folder / "r.yaml", data))]) == 0
    return folder / "run"


def logged(run) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_log(run)}


def test_the_step_after_a_checkpoint_gives_the_loss_that_was_logged(run):
    replayed = replay(run, 5)
    assert replayed.weights_of == 4
    assert replayed.logged == logged(run)[5]
    assert float(replayed.total().mean()) == pytest.approx(replayed.logged, rel=1e-5)


def test_advance_trains_up_to_a_step_in_between(run):
    replayed = replay(run, 2, advance=True)
    assert replayed.weights_of == 1
    assert float(replayed.total().mean()) == pytest.approx(logged(run)[2], rel=1e-5)


def test_dropout_and_three_ranks_replay_on_one(tmp_path):
    """The draws of every rank are made again."""
    model = RESNET | {"image": "vit_tiny_patch16_224", "image_size": 16}
    model["image_kwargs"] = VIT["image_kwargs"] | {"drop_rate": 0.5, "proj_drop_rate": 0.3}
    data = recipe_data(write_shards(tmp_path / "shards"), tmp_path / "run", model=model, steps=3)
    recipe = write_recipe(tmp_path / "r.yaml", data)
    run_ranks(train_rank, 3, str(recipe))
    replayed = replay(tmp_path / "run", 3)
    assert replayed.weights_of == 2
    assert float(replayed.total().mean()) == pytest.approx(logged(tmp_path / "run")[3], rel=1e-5)


def test_synchronised_batchnorm_replays_over_all_ranks(tmp_path):
    model = RESNET | {"image_kwargs": {}}
    data = recipe_data(write_shards(tmp_path / "shards"), tmp_path / "run", model=model, steps=3)
    run_ranks(train_rank, 3, str(write_recipe(tmp_path / "r.yaml", data)))
    replayed = replay(tmp_path / "run", 3)
    assert float(replayed.total().mean()) == pytest.approx(logged(tmp_path / "run")[3], rel=1e-5)


def train_rank(rank: int, world: int, recipe: str) -> None:
    import torch

    from pretrain.distributed.process import Process
    from pretrain.recipe import load_recipe
    from pretrain.train import train

    train(load_recipe(recipe), Process(rank, world, 0, torch.device("cpu")))


def test_the_page_holds_every_sample_and_escapes_captions(run, tmp_path):
    replayed = replay(run, 5)
    replayed.batch.captions["caption"][0] = "<script>alert(1)</script>"
    write_page(replayed, tmp_path / "page.html", top=12)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 12
    assert "<script>alert" not in page
    assert "data:image/png;base64" in page


def test_what_cannot_be_replayed_is_said(run, tmp_path):
    with pytest.raises(UserError, match="steps 1 to 6"):
        replay(run, 7)
    with pytest.raises(UserError, match="--advance"):
        replay(run, 2)
    with pytest.raises(UserError, match="is not a run"):
        replay(tmp_path, 1)
