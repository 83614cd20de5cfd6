"""The trainer as its users run it: from the command line, killed, resumed, refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import find_latest
from pretrain.exit_codes import NOT_FINITE, STOPPED
from pretrain.recipe import load_recipe
from pretrain.run import RunFolder
from pretrain.telemetry import read_events, read_log
from tests.runs import ENVIRONMENT, kill_and_resume, losses, start, train, train_here, wait_for_a_step, weights
from tests.tiny import RESNET, VIT, add, picture, recipe_data, write_recipe, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("world", [1, 3])
def test_a_run_killed_anywhere_resumes_bit_for_bit(tmp_path, shards, world):
    """Dropout and BatchNorm on; killed twice at moments that differ each time the test runs, during saves too."""
    changes = {"model": RESNET, "world": world, "steps": 14}
    whole = write_recipe(tmp_path / "whole.yaml", recipe_data(shards, tmp_path / "whole", **changes))
    train(str(whole))
    recipe = write_recipe(tmp_path / "cut.yaml", recipe_data(shards, tmp_path / "cut", **changes))
    kill_and_resume(recipe, tmp_path / "cut")
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path, shards):
    run = tmp_path / "run"
    data = recipe_data(shards, run, world=2, steps=4000, checkpoint={"every": 10000})
    recipe = write_recipe(tmp_path / "r.yaml", data)
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain", str(recipe)],
        env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for_a_step(run / "log.jsonl", process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, told = process.communicate(timeout=60)
    assert process.returncode == STOPPED, told  # so that `train && evaluate` does not go on with a part of a run
    assert "the same command goes on" in told
    stopped = find_latest(run / "checkpoints")
    assert stopped is not None
    assert stopped.step < 4000
    assert f"resuming at step {stopped.step}" in train(str(recipe), f"steps={stopped.step + 2}")


def test_a_job_scheduler_that_listens_too_is_called_once_all_is_saved(tmp_path, shards):
    """submitit's handler puts the job back into the queue: it must find the checkpoint, and be called once."""
    run, found = tmp_path / "run", []
    recipe = write_recipe(tmp_path / "r.yaml", recipe_data(shards, run, steps=4000, checkpoint={"every": 10000}))

    def requeue(number, frame):
        found.append(find_latest(run / "checkpoints").step)

    def warn() -> None:
        while not read_log(run / "log.jsonl"):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR2)

    run.mkdir()
    (run / "log.jsonl").touch()
    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        threading.Thread(target=warn, daemon=True).start()
        assert train_here(recipe) == STOPPED
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert len(found) == 1
    assert 0 < found[0] < 4000


def test_accumulation_gives_the_same_run(tmp_path, shards):
    for k in (1, 3):
        data = recipe_data(shards, tmp_path / str(k), accumulation=k)
        assert train_here(write_recipe(tmp_path / f"{k}.yaml", data)) == 0
    one, three = losses(tmp_path / "1"), losses(tmp_path / "3")
    assert [one[s] for s in sorted(one)] == pytest.approx([three[s] for s in sorted(three)], rel=1e-5)


def test_another_recipe_in_the_same_folder_is_refused_with_the_difference(tmp_path, shards, capsys):
    recipe = write_recipe(tmp_path / "r.yaml", recipe_data(shards, tmp_path / "run", steps=2))
    assert train_here(recipe) == 0
    assert train_here(recipe, "seed=5") == 2
    assert "seed: 0 -> 5" in capsys.readouterr().err
    # what does not make it another run may change
    assert train_here(recipe, "steps=4", "log.every=2", "data.threads=1", "optimizer.lr=1e-4") == 0
    assert find_latest(tmp_path / "run" / "checkpoints").step == 4


def test_a_changed_data_set_is_refused_at_resume(tmp_path, capsys):
    shards = write_shards(tmp_path / "data", samples=40)
    recipe = write_recipe(tmp_path / "r.yaml", recipe_data(shards, tmp_path / "run", steps=2))
    assert train_here(recipe) == 0
    write_shards(tmp_path / "data", samples=41)
    assert train_here(recipe, "steps=4") == 2
    assert "order is not the one" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(tmp_path, shards, capsys):
    recipe = write_recipe(tmp_path / "r.yaml", recipe_data(shards, tmp_path / "run", steps=2))
    assert train_here(recipe) == 0
    wider = recipe_data(shards, tmp_path / "other", steps=2, model=VIT | {"embed_dim": 6})
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "other" / "checkpoints")
    assert train_here(write_recipe(tmp_path / "o.yaml", wider)) == 2
    assert "is of another model" in capsys.readouterr().err


def test_damaged_samples_are_passed_over_and_named(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i in range(40):
            add(tar, f"s{i}.png", picture(i) if i != 7 else b"not an image")
            add(tar, f"s{i}.txt", b"a thing" if i != 9 else b"caf\xe9 \xff")
    data = recipe_data(folder, tmp_path / "run", data={"sources": [str(folder)], "max_damaged": 0.2})
    assert train_here(write_recipe(tmp_path / "r.yaml", data)) == 0
    told = [json.loads(line) for line in (tmp_path / "run" / "damaged.jsonl").read_text().splitlines()]
    assert {t["key"] for t in told} == {"s7", "s9"}
    assert any("UTF-8" in t["reason"] for t in told)
    assert all(torch.isfinite(torch.tensor(v)) for v in losses(tmp_path / "run").values())


def test_a_world_that_is_not_met_is_refused(tmp_path, shards):
    recipe = write_recipe(tmp_path / "r.yaml", recipe_data(shards, tmp_path / "run", world=2))
    command = [
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "-m",
        "pretrain",
        str(recipe),
    ]
    done = subprocess.run([sys.executable, *command], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs world 2, but the launcher started 1 process." in done.stderr
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_accelerate_launch_trains_on_two_processes_like_the_own_launcher(tmp_path, shards):
    for name in ("own", "accelerate"):
        write_recipe(tmp_path / f"{name}.yaml", recipe_data(shards, tmp_path / name, world=2, steps=3))
    train(str(tmp_path / "own.yaml"))
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "pretrain"]
    done = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "accelerate.yaml")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "own") == losses(tmp_path / "accelerate")


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path, shards, capsys):
    recipe = write_recipe(tmp_path / "r.yaml", recipe_data(shards, tmp_path / "run", optimizer={"lr": 1e18}))
    assert train_here(recipe) == NOT_FINITE
    told = capsys.readouterr().err
    assert "No weight was touched" in told
    assert "polyview replay" in told


def test_two_trainers_never_share_a_folder(tmp_path, shards):
    recipe = write_recipe(tmp_path / "r.yaml", recipe_data(shards, tmp_path / "run", steps=5000))
    first = start(str(recipe))
    wait_for_a_step(tmp_path / "run" / "log.jsonl", first)
    second = start(str(recipe))
    _, told = second.communicate()
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert "another process is training" in told


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, shards):
    recipe = write_recipe(tmp_path / "r.yaml", recipe_data(shards, tmp_path / "run", steps=4))
    assert train_here(recipe) == 0
    data = next((tmp_path / "run" / "checkpoints" / "step_00000004").glob("data-*"))
    with open(data, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert train_here(recipe, "steps=6") == 0
    resumed = [e for e in read_events(tmp_path / "run") if e["event"] == "resume"]
    assert [e["step"] for e in resumed] == [2]


def test_a_run_that_is_done_says_so(tmp_path, shards, caplog):
    recipe = write_recipe(tmp_path / "r.yaml", recipe_data(shards, tmp_path / "run", steps=2))
    assert train_here(recipe) == 0
    before = (tmp_path / "run" / "run.json").read_text()
    with caplog.at_level(logging.INFO):
        assert train_here(recipe) == 0
    assert "already trained" in caplog.text
    assert (tmp_path / "run" / "run.json").read_text() == before


def test_a_run_that_never_saved_gives_its_folder_to_another_recipe(tmp_path, shards):
    """The first command was wrong and is put right; once there is a checkpoint the folder is that run's."""
    hydra = {"objectives": {"hydra": {"classes": 3}}}
    wrong = write_recipe(tmp_path / "wrong.yaml", recipe_data(shards, tmp_path / "run", **hydra))
    right = write_recipe(tmp_path / "right.yaml", recipe_data(shards, tmp_path / "run", steps=2))
    RunFolder(tmp_path / "run").begin(load_recipe(wrong), {})
    assert train_here(right) == 0
    assert train_here(wrong) == 2
