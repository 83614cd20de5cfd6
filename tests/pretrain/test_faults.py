"""Ranks that hang, lag, crash or meet a broken machine: seen, named, and ended so that a run can be taken up."""

from __future__ import annotations

import datetime
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain.crash_loop import check
from pretrain.distributed import process
from pretrain.distributed.failures import explained
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.exit_codes import CRASH_LOOP, HUNG, LOST
from pretrain.telemetry.alive import alive, heartbeats
from pretrain.telemetry.heartbeat import Heartbeat
from pretrain.telemetry.straggler import Stragglers
from tests.ranks import free_port, run_ranks
from tests.runs import ENVIRONMENT, LAUNCH

CPU = torch.device("cpu")

BEATING = """
import ctypes, os, signal, sys, time
from pathlib import Path
import torch.distributed as dist
from pretrain.distributed.process import process_group
from pretrain.telemetry.alive import heartbeats
from pretrain.telemetry.heartbeat import Heartbeat
import torch
with process_group(1.0) as process:
    heartbeat = Heartbeat(Path(sys.argv[1]), process=process, every_s=0.2, hang_s=1.0)
    heartbeat.at(0, "data")
    heartbeat.at(1, "data")  # the first step is done: from here on a second is enough
    {then}
    heartbeat.close()
"""
WAITS = "heartbeat.at(1, 'step'); dist.all_reduce(torch.ones(1)) if process.first else os.kill(os.getpid(), 19)"
HOLDS = "ctypes.PyDLL(None).sleep(6)"
BEATS = "any(heartbeat.at(1, 'evaluate') or time.sleep(0.25) for _ in range(10))"
SLEEPS = "print('here', flush=True); time.sleep(0.4)"


def beating(run: Path, then: str, launch: bool = False) -> subprocess.Popen:
    """A process, or a world of two, that beats for the run in folder `run`, and does `then`."""
    argv = [*(["-c", LAUNCH] if launch else ["-c"]), BEATING.format(then=then), str(run)]
    return subprocess.Popen(
        [sys.executable, *argv], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_who_stands_still_writes_its_stacks_and_ends_and_nobody_else_does(tmp_path):
    started = {name: beating(tmp_path / name, globals()[name], name == "WAITS") for name in ("WAITS", "HOLDS", "BEATS")}
    stopped = beating(tmp_path / "SLEEPS", SLEEPS)
    assert stopped.stdout.readline() == "here\n"
    stopped.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    stopped.send_signal(signal.SIGCONT)  # a node that was suspended: no rank of it hung
    told = {name: process.communicate(timeout=60)[1] for name, process in started.items()}
    stopped.communicate(timeout=60)

    assert started["WAITS"].returncode == HUNG, told["WAITS"]  # in a collective, in C
    stacks = (tmp_path / "WAITS" / "heartbeat" / "rank_00000.stacks").read_text()
    assert "rank 0 on" in stacks
    assert "(step 1, step). rank 1 on" in stacks
    assert "gave no sign of life for" in stacks
    assert "in all_reduce" in stacks
    assert stacks.splitlines()[0] in told["WAITS"]

    assert started["HOLDS"].returncode == 0, told["HOLDS"]  # in C, with the interpreter held: shown
    assert "Timeout (0:00:0" in told["HOLDS"]
    assert started["BEATS"].returncode == 0, told["BEATS"]
    assert stopped.returncode == 0  # suspended and continued: only its stacks were shown


def test_signs_of_life_say_who_is_where_and_those_of_a_larger_world_go(tmp_path):
    (tmp_path / "heartbeat").mkdir()
    (tmp_path / "heartbeat" / "rank_00007.json").write_text("{}")
    begin = time.time()
    heartbeat = Heartbeat(tmp_path, process=Process(0, 1, 0, CPU), every_s=30, hang_s=None)
    heartbeat.at(41, "forward")
    heartbeat.close()
    (sign,) = heartbeats(tmp_path)
    assert (sign["rank"], sign["step"], sign["phase"], sign["device"]) == (0, 41, "end", "cpu")
    assert begin <= sign["time"] <= time.time()
    assert 0 <= sign["since"] < 5
    json.dumps(sign)


@pytest.mark.parametrize(
    ("phase", "age_s", "every_s", "lives"),
    [("data", 50, 10, True), ("data", 61, 10, False), ("data", 300, 120, True), ("data", 500, 120, False)]
    + [("end", 1, 10, False)],
)
def test_a_run_lives_as_long_as_its_own_interval_says(tmp_path, phase, age_s, every_s, lives):
    sign = {"rank": 0, "host": "elsewhere", "pid": 1, "phase": phase, "time": time.time() - age_s, "every_s": every_s}
    (tmp_path / "heartbeat").mkdir()
    (tmp_path / "heartbeat" / "rank_00000.json").write_text(json.dumps(sign))
    assert alive(tmp_path) == lives


def test_a_place_that_takes_no_signs_of_life_does_not_end_the_training(tmp_path, caplog):
    (tmp_path / "heartbeat").write_text("not a folder")
    heartbeat = Heartbeat(tmp_path, process=Process(0, 1, 0, CPU), every_s=0.05, hang_s=60)
    for step in range(5):
        heartbeat.at(step, "data")
        time.sleep(0.06)
    heartbeat.close()
    assert len([r for r in caplog.records if "no signs of life" in r.message]) == 1
    assert not heartbeats(tmp_path)


def lagging(rank: int, world: int) -> list:
    """Rank 1 is three times as slow in windows 1 to 4, then as fast as the others; a millisecond is no lag."""
    stragglers, seen = Stragglers(Process(rank, world, rank, CPU), 1.25, every=4, windows=3), []
    for step in range(4 * 8):
        slow = rank == 1 and step < 16
        stragglers.add(0.3 if slow else 0.1 + 0.001 * rank, 0.24 if slow else 0.0)
        if report := stragglers.read():
            seen.append([report.line, report.figures, report.own_s])
    dist.barrier()
    return seen


@pytest.mark.parametrize("world", [2, 3])
def test_a_straggler_is_named_once_with_its_host_on_every_rank(world):
    seen = run_ranks(lagging, world)
    assert all(other == seen[0] for other in seen)
    lines = [line for line, *_ in seen[0]]
    assert len(lines) == 7  # read one window late
    named = [line for line in lines if line]
    if world == 2:  # the median of two is between them: 0.3 is 1.5 times 0.2
        assert len(named) == 1
        assert "takes 1.5x the median (0.300 s against 0.200 s" in named[0]
    else:
        assert [i for i, line in enumerate(lines) if line] == [2]
        assert named[0].startswith("rank 1 on ")
        assert (
            "takes 2.9x the median (0.300 s against 0.102 s a step before the first collective, 80% of it" in named[0]
        )
    assert seen[0][0][1]["own_s/max"] == pytest.approx(0.3)
    assert seen[0][6][2] == pytest.approx([0.1 + 0.001 * r for r in range(world)])


def waiting(rank: int, world: int) -> list:
    """What gloo says of a rank that does not come; none of the ranks ends."""
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=1))
    if rank == 0:
        with pytest.raises(RuntimeError) as caught:
            dist.all_reduce(torch.ones(1), group=group)
        error = explained(caught.value, 0, "cpu")
        return [str(error), error and error.exit_code]
    time.sleep(2.5)
    return []


def test_a_rank_that_never_comes_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(process, "TIMEOUT_S", 1.0)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="waited too long for another rank") as refused, process.process_group(1800):
        pass
    assert refused.value.exit_code == HUNG


def test_what_gloo_and_cuda_say_becomes_what_to_do():
    (told, code), _ = run_ranks(waiting, 2)
    assert code == HUNG
    assert told.startswith("rank 0 on ")
    assert "RUN/heartbeat shows where each stands" in told

    def said(text: str) -> UserError | None:
        return explained(RuntimeError(text), 3, "cuda:1")

    broken = said("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be …")
    assert "rank 3 on" in str(broken)
    assert "GPU 1 is broken" in str(broken)
    assert "--exclude=" in str(broken)
    assert "might be" not in str(broken)
    assert "CUDA_LAUNCH_BLOCKING=1" in str(said("CUDA error: device-side assert triggered"))
    assert "NCCL_DEBUG=INFO" in str(said("NCCL error in: x.cpp:1, unhandled system error"))
    assert said("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1").exit_code == LOST
    assert said("CUDA out of memory. Tried to allocate 2 GiB") is None
    assert said("mat1 and mat2 shapes cannot be multiplied") is None


def test_a_step_that_crashed_again_and_again_is_not_tried_once_more():
    crash, other = {"from_step": 40, "host": "n12"}, {"from_step": 20, "host": "n1"}
    check(Path("run"), [], 0, 1)
    check(Path("run"), [other, other, other, crash, crash], 40, 3)
    check(Path("run"), [crash, crash, crash, crash | {"ended": "stopped"}, crash, crash], 40, 3)
    check(Path("run"), [crash, crash, crash | {"ended": "refused"}], 40, 3)
    with pytest.raises(UserError) as refused:
        check(Path("run"), [other, crash, crash, {"from_step": 40, "ended": "refused"}, crash], 40, 3)
    assert refused.value.exit_code == CRASH_LOOP
    told = str(refused.value)
    assert "the last 3 starts from step 40" in told
    assert "hosts: n12)" in told
    assert "polyview replay run --step 41" in told
    assert "faults.max_crashes=4" in told
    check(Path("run"), [other, crash, crash, crash], 40, 4)
