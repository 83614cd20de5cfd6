"""Where time and memory go: phases, flops, profiles on demand, collections of garbage, and running out of memory."""

from __future__ import annotations

import gc
import gzip
import json
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.flops import caption_tokens, step_flops
from pretrain.oom import memory_explained
from pretrain.reader import Batch
from pretrain.recipe import Recipe
from pretrain.telemetry import Phases, ProfileWindow, StepClock, collected_together, profile_request
from pretrain.telemetry.heartbeat import Heartbeat
from pretrain.telemetry.mfu import peak_flops
from pretrain.telemetry.profile_request import profile_run, write_request
from tests import tiny
from tests.ranks import run_ranks
from tests.runs import ENVIRONMENT, start, wait_for_a_step

# --- phases and the clock


def test_every_moment_belongs_to_one_phase() -> None:
    phases = Phases()
    begin = time.perf_counter()
    for _ in range(2):
        phases.mark("data")
        time.sleep(0.02)
        phases.mark("forward")
        with phases("evaluate"):
            time.sleep(0.05)
        time.sleep(0.01)
    spent = phases.read(steps=2)
    assert set(spent) == {"time/data_s", "time/forward_s", "time/evaluate_s"}
    assert spent["time/data_s"] == pytest.approx(0.02, abs=0.01)
    assert spent["time/evaluate_s"] == pytest.approx(0.05, abs=0.01)
    assert 2 * sum(spent.values()) == pytest.approx(time.perf_counter() - begin, abs=0.005)
    assert set(phases.read()) == {"time/forward_s"}, "begun again, in the phase that it is"


def test_a_mark_costs_next_to_nothing() -> None:
    phases = Phases()
    begin = time.process_time()
    for _ in range(10_000):
        phases.mark("forward")
    assert (time.process_time() - begin) / 10_000 < 20e-6  # ten a step of 200 ms are 0.1 %


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_phases_of_a_gpu_are_its_own_time() -> None:
    phases, x = Phases(torch.device("cuda")), torch.randn(4096, 4096, device="cuda")
    phases.mark("forward")
    for _ in range(50):
        x = x @ x / 64
    phases.mark("loss")
    queued = time.perf_counter()
    spent = phases.read()
    assert time.perf_counter() > queued
    assert spent["time/forward_s"] > 10 * spent["time/loss_s"]


def test_the_clock_gives_flops_only_of_what_is_known() -> None:
    clock = StepClock(0, 64, phases=Phases(), world=2)
    assert "tflops" not in clock.read(1, 0.0)
    clock.needs(4e12)
    time.sleep(0.05)
    line = clock.read(3, 0.0)
    assert line["tflops"] == pytest.approx(2 / line["step_s"])
    assert "mfu" not in line, "a CPU's peak is not known"
    assert line["memory_gib"] > 0


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp16", 989),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GB200", "bf16", 2500),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA A1000", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
    ],
)
def test_peaks_by_the_names_that_devices_have(name: str, precision: str, tflops: float | None) -> None:
    assert peak_flops(name, precision) == (None if tflops is None else tflops * 1e12)


# --- flops


def of(**changes) -> Recipe:
    return Recipe.model_validate(tiny.recipe_data(Path("none"), Path("none"), **changes))


def captions(*lengths: int, context: int = 12) -> Batch:
    n = len(lengths)
    tokens = torch.stack([(torch.arange(context) < length).long() for length in lengths])
    number = torch.zeros(n, dtype=torch.long)
    return Batch(
        0, number, number, number, [""] * n, torch.ones(n), number, images={}, tokens={"caption": tokens}, captions={}
    )


def test_flops_of_a_step_are_those_of_the_matrices() -> None:
    """A ViT of width C and depth D on T tokens, by hand: forward, twice that backward but for the pixels' gradient."""
    model = tiny.VIT | {"text": None, "embed_dim": None}
    recipe = of(model=model, objectives={"swav": {"prototypes": 8, "hidden": 8, "crops": [[2, None, [0.14, 1.0]]]}})
    width, depth, tokens, patch = 16, 2, 5, 8 * 8 * 3
    block = tokens * 12 * width**2 + 2 * tokens**2 * width  # qkv, out and MLP; scores and their sum
    embed = (tokens - 1) * patch * width
    crops = 2
    expected = 2 * crops * (3 * depth * block + 2 * embed) * recipe.global_batch
    assert step_flops(recipe, 60, captions(5)) == pytest.approx(expected, rel=1e-6)


def test_what_is_locked_or_a_teacher_has_no_backward_and_longer_captions_cost_more() -> None:
    batch = captions(4, 4)
    whole = step_flops(of(), 60, batch)
    image_locked = step_flops(of(model=tiny.VIT | {"lock": {"image": True}}), 60, batch)
    text_only = step_flops(of(model=tiny.VIT | {"lock": {"image": True, "projection": True}}), 60, batch)
    assert text_only < image_locked < 0.8 * whole
    assert step_flops(of(accumulation=2), 60, batch) == whole, "cached features are computed twice and count once"
    assert step_flops(of(), 60, captions(8, 8)) > whole
    moco = of(objectives={"moco": {"queue": 24}})
    assert step_flops(moco, 60, batch) > 0
    assert caption_tokens(captions(3, 6, 0)) == 5


# --- garbage


class Cycle:
    def __init__(self) -> None:
        self.me = self


def test_garbage_is_collected_at_its_step_and_at_no_other() -> None:
    assert gc.isenabled()
    with collected_together() as collect:
        assert not gc.isenabled()
        gone = weakref.ref(Cycle())
        for step in range(1, 1000):
            collect(step)
        assert gone() is not None
        collect(1000)
        assert gone() is None
    assert gc.isenabled()


# --- profiles


def _profiled(rank: int, world: int, folder: str) -> list[int]:
    process = Process(rank, world, rank, torch.device("cpu"))
    window, begun = ProfileWindow(Path(folder), process), []
    for step in range(1, 9):
        torch.randn(32, 32) @ torch.randn(32, 32)
        window.step()
        if step >= 3:  # what the ranks agreed on, shown to them longer than it takes
            window.start(step)
        begun.append(int(window._profile is not None))
        torch.distributed.barrier()
    return begun


def test_all_ranks_record_the_steps_that_are_asked_for_once(tmp_path: Path) -> None:
    write_request(tmp_path, steps=2)
    assert run_ranks(_profiled, 2, str(tmp_path)) == [[0, 0, 1, 1, 0, 0, 0, 0]] * 2
    assert not (tmp_path / "PROFILE").exists()
    (folder,) = (tmp_path / "profile").iterdir()
    assert folder.name == "step_00000004"
    for rank in range(2):
        trace = json.loads(gzip.decompress((folder / f"rank_{rank:05d}.json.gz").read_bytes()))
        assert sum(e.get("name") == "aten::mm" for e in trace["traceEvents"]) == 2
        assert "aten::mm" in (folder / f"rank_{rank:05d}.txt").read_text()


def test_a_request_is_looked_for_by_the_first_rank_alone_and_seldom(tmp_path: Path) -> None:
    first, other = (ProfileWindow(tmp_path, Process(r, 2, r, torch.device("cpu"))) for r in (0, 1))
    assert not first.wanted()
    write_request(tmp_path, steps=3)
    assert not first.wanted(), "it looked less than a second ago"
    time.sleep(1.05)
    assert first.wanted()
    assert not other.wanted()
    (tmp_path / "PROFILE").write_text("{not json")
    first.start(1)
    assert first._profile is None


def test_the_door_profiles_a_run_that_goes_on(tmp_path: Path) -> None:
    data = tiny.recipe_data(tiny.write_shards(tmp_path / "shards"), tmp_path / "run", steps=100_000)
    recipe = tiny.write_recipe(tmp_path / "r.yaml", data | {"checkpoint": {"every": 100_000}})
    training = start(str(recipe))
    try:
        wait_for_a_step(tmp_path / "run/log.jsonl", training)
        asked = [sys.executable, "-m", "pretrain", "profile", str(tmp_path / "run"), "--steps", "2"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=200, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        assert "Self CPU" in done.stdout
        assert "1 trace: " in done.stdout
        assert training.poll() is None
    finally:
        training.send_signal(signal.SIGTERM)
        training.communicate(timeout=100)
    with pytest.raises(UserError, match="nobody trains there"):
        profile_run(tmp_path / "run", 2)
    with pytest.raises(UserError, match="between 1 and 100"):
        profile_run(tmp_path / "run", 0)
    with pytest.raises(UserError, match="is not a run"):
        profile_run(tmp_path, 2)


@pytest.mark.parametrize(
    ("fate", "told"),
    [
        ("ends", "the run ended before its profile was whole"),
        ("one fails", "rank_00001|rank 1 was not written: .*json.gz"),
        ("one is silent", "not every rank has written its profile"),
    ],
)
def test_who_waits_for_a_profile_that_does_not_come_is_told(tmp_path: Path, monkeypatch, fate: str, told: str) -> None:
    monkeypatch.setattr(profile_request, "OTHERS_S", 1.0)
    (tmp_path / "recipe.yaml").write_text("")
    (tmp_path / "run.json").write_text('[{"world": 2}]')
    heart, ranks = beating(tmp_path), [window(tmp_path, rank) for rank in range(2)]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(profile_run, tmp_path, 1, look_every_s=0.1)
        while not (tmp_path / "PROFILE").exists() and not asked.done():
            time.sleep(0.02)
        if fate == "one fails":
            (tmp_path / "profile/step_00000002/rank_00001.json.gz").mkdir(parents=True)  # where its trace should go
        for rank in {"ends": [], "one fails": ranks[::-1], "one is silent": ranks[:1]}[fate]:
            rank.start(1)
            rank.step()
        if fate == "ends":
            heart.close()
        with pytest.raises(UserError, match=told):
            asked.result(timeout=30)
    heart.close()
    assert not (tmp_path / "PROFILE").exists()


def beating(run: Path) -> Heartbeat:
    return Heartbeat(run, process=Process(0, 2, 0, torch.device("cpu")), every_s=0.1, hang_s=None)


def window(run: Path, rank: int) -> ProfileWindow:
    return ProfileWindow(run, Process(rank, 2, rank, torch.device("cpu")))


# --- memory


def test_running_out_of_memory_says_what_would_fit(tmp_path: Path) -> None:
    deep = {"image_size": 64, "image_kwargs": {"embed_dim": 64, "depth": 12, "num_heads": 2, "patch_size": 8}}
    shards = str(tiny.write_shards(tmp_path / "shards"))
    recipe = of(data={"sources": [shards]}, global_batch=48, model=tiny.VIT | deep)
    process = Process(1, 2, 1, torch.device("cpu"))
    with pytest.raises(UserError) as caught, memory_explained(recipe, process, tmp_path):
        torch.empty(2**55)
    told = str(caught.value)
    assert told.startswith("rank 1 on ")
    assert "the CPU, ran out of memory: " in told
    ways = told.split("the cheapest first:\n  ")[1].split("\n  ")
    assert len(ways) == 3
    assert ways[0].startswith("accumulation=2: about ")
    assert ways[1].startswith("precision=bf16")
    assert "GiB a rank" in ways[0]
    note = tmp_path / "oom" / "rank_00001.txt"
    assert str(note) in told
    assert "resident" in note.read_text()


def test_other_errors_pass_and_no_estimate_is_no_silence(tmp_path: Path) -> None:
    process = Process(0, 1, 0, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), memory_explained(of(), process, tmp_path):
        torch.ones(2, 3) @ torch.ones(2, 3)
    lost = of(data={"sources": [str(tmp_path / "gone")]}, model=tiny.VIT | {"image": "no_such_model"})
    with pytest.raises(UserError, match="a larger accumulation"), memory_explained(lost, process, tmp_path):
        raise MemoryError
