"""How runs stand, told by real runs on this machine and by what squeue and sacct 22.05 were seen to say."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from slurm import queue, records, tail
from slurm.__main__ import main
from slurm.details import ranks
from slurm.reasons import held, why
from slurm.suspects import silent
from tests.runs import start, train_here, wait_for_a_step
from tests.slurm.queues import FakeSlurm
from tests.tiny import recipe_data, write_recipe, write_shards

# squeue --me --array --noheader --format '%i|%T|%r|%D|%N|%M|%l|%S|%j|%k', captured from Slurm 22.05.8
CAPTURED = """\
3|PENDING|Resources|3||0:00|UNLIMITED|2027-11-25T08:04:54|wrap|polyview:/w/big
4|PENDING|Dependency|1||0:00|UNLIMITED|N/A|wrap|polyview:/w/dep
5_3|PENDING|JobArrayTaskLimit|1||0:00|UNLIMITED|N/A|wrap|polyview:/w/arr
6|PENDING|BeginTime|1||0:00|UNLIMITED|2026-11-25T09:04:54|wrap|(null)
7|PENDING|PartitionNodeLimit|8||0:00|UNLIMITED|N/A|wrap|(null)
2|PENDING|JobHeldUser|1||0:00|UNLIMITED|N/A|wrap|polyview:/w/held
5_0|PENDING|job requeued in held state|1||0:00|UNLIMITED|N/A|wrap|polyview:/w/arr
1|RUNNING|None|2|n[1-2]|0:03|365-00:00:00|2026-11-25T08:04:54|we|ird|polyview:/w/run|1
5_1|RUNNING|None|1|n1|0:01|365-00:00:00|2026-11-25T08:04:56|wrap|polyview:/w/arr
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"), samples=24)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder on a machine without Slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    return tmp_path


@pytest.fixture
def slurm(here: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(here / "fake")
    monkeypatch.setenv("PATH", fake.path)
    return fake


def recipe(here: Path, shards: Path, **changes: Any) -> Path:
    return write_recipe(here / "r.yaml", recipe_data(shards, here / "runs/a", **({"steps": 3} | changes)))


def told(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["status", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def shown(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert main(["status", *map(str, argv)]) == 0
    return capsys.readouterr().out


def put_in_queue(slurm: FakeSlurm, line: str) -> None:
    with open(Path(slurm.path.partition("/bin")[0]) / "queue", "a") as file:
        file.write(line + "\n")


# ---------------------------------------------------------------- the queue


def test_what_squeue_says() -> None:
    jobs = {job.job: job for job in queue.parse(CAPTURED)}
    assert (jobs["1"].name, jobs["1"].about, jobs["1"].where) == ("we|ird", "/w/run|1", "n[1-2]")
    assert (jobs["6"].name, jobs["6"].about) == ("wrap", "")
    assert [job for job in jobs if jobs[job].waits] == ["3", "4", "5_3", "6", "7", "2", "5_0"]
    assert [job for job in jobs if held(jobs[job])] == ["2", "5_0"]
    assert why(jobs["3"]) == "waits for free nodes; expected to begin 2027-11-25 08:04:54"
    assert why(jobs["2"]) == "held by its user: `scontrol release 2`"
    assert "scontrol release 5_0" in why(jobs["5_0"])
    assert "more nodes than the partition has" in why(jobs["7"])


def test_a_reason_that_has_no_words_here_is_told_as_it_is() -> None:
    job = queue.parse("9|PENDING|QOSMaxGRESPerUser|1||0:00|1|N/A|x|polyview:/w\n")[0]
    assert why(job) == "a limit of the quality of service is reached (QOSMaxGRESPerUser)"
    assert why(queue.parse("9|PENDING|Sunspots|1||0:00|1|N/A|x|polyview:/w\n")[0]) == "Sunspots"


def test_whose_jobs_are_meant(here: Path) -> None:
    jobs = queue.parse(CAPTURED)

    def meant(what: str) -> list[str]:
        return [job.job for job in queue.belonging(what, jobs)]

    assert meant("5") == ["5_3", "5_0", "5_1"]
    assert meant("5_1") == ["5_1"]
    assert meant("/w/arr") == meant("/w/../w/arr/") == ["5_3", "5_0", "5_1"]
    assert meant("/w/ar") == []
    assert len(meant("/w")) == 7


def test_the_jobs_of_one_run(here: Path) -> None:
    lines = [
        f"1|RUNNING|None|1|n1|0:01|1:00:00|N/A|a|polyview:{here}/alias/a",
        f"5_0|PENDING|Priority|1||0:00|1:00:00|N/A|sweep|polyview:{here}/runs",
        f"5_1|PENDING|Priority|1||0:00|1:00:00|N/A|sweep|polyview:{here}/runs",
        f"6|PENDING|Priority|1||0:00|1:00:00|N/A|report|polyview:{here}/runs",
        f"7|RUNNING|None|1|n1|0:01|1:00:00|N/A|b|polyview:{here}/elsewhere",
        "8|RUNNING|None|1|n1|0:01|1:00:00|N/A|none|(null)",
    ]
    jobs = queue.parse("\n".join(lines))
    (here / "runs/a").mkdir(parents=True)
    (here / "alias").symlink_to("runs")
    for job, cluster in (("5_1", "slurm"), ("6", "local"), ("7", "slurm"), ("8", "slurm")):
        records.append(here / "runs/b/slurm", "submitted", job=job, cluster=cluster)

    def found(run: str) -> list[str]:
        assert [job.job for job in queue.belonging(run, jobs)] == [job.job for job in queue.of_run(Path(run), jobs)]
        return [job.job for job in queue.of_run(Path(run), jobs)]

    assert found("runs/a") == found(f"{here}/alias/a") == ["1"]
    # its element of the array; 6 was a process here of that number, 7 and 8 are numbers that came again
    assert found("runs/b") == found("alias/b") == ["5_1"]
    assert found("runs/c") == []


# ---------------------------------------------------------------- runs


def test_a_run_at_its_end(here: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(recipe(here, shards)) == 0
    (run,) = told(capsys)["runs"]
    assert (run["run"], run["state"], run["step"], run["total_steps"]) == ("runs/a", "done", 3, 3)
    assert (run["saved"], run["restarts"], run["last_end"], run["eta_s"]) == (3, 0, "done", None)
    lines = [json.loads(line) for line in (here / "runs/a/log.jsonl").read_text().splitlines()]
    assert run["loss"] == next(line["loss"] for line in lines if line.get("step") == 3 and "loss" in line)
    assert "checkpoint: runs/a/checkpoints/step_00000003" in shown(capsys, "runs/a")


def test_a_run_that_goes_on_and_is_killed(here: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe(here, shards, steps=100_000, checkpoint={"every": 1000}, faults={"heartbeat_s": 0.2})
    process = start(str(file))
    try:
        wait_for_a_step(here / "runs/a/log.jsonl", process)
        (run,) = told(capsys, "runs")["runs"]
        assert (run["state"], run["total_steps"]) == ("RUNNING", 100_000)
        assert run["detail"].endswith("without Slurm")
        assert run["eta_s"] > 10
        assert run["images_per_s"] > 0
        assert main(["cancel", "runs/a"]) == 2
        assert f"`kill {process.pid}` on" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait(60)
    (run,) = told(capsys)["runs"]
    assert (run["state"], run["last_end"], run["eta_s"], run["images_per_s"]) == ("crashed", "crashed", None, None)


def test_a_run_that_was_stopped(here: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = start(str(recipe(here, shards, steps=100_000, checkpoint={"every": 1000})))
    wait_for_a_step(here / "runs/a/log.jsonl", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    (run,) = told(capsys)["runs"]
    assert (run["state"], run["last_end"]) == ("stopped", "stopped")
    assert run["saved"] == run["step"] > 0


def test_a_job_that_waits(here: Path, shards: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(recipe(here, shards))]) == 0
    (run,) = told(capsys)["runs"]
    assert (run["state"], run["jobs"], run["step"]) == ("PENDING", ["1"], None)
    assert run["detail"] == "job 1: other jobs come first"
    slurm.drop("1")
    (run,) = told(capsys)["runs"]
    assert (run["state"], run["detail"]) == ("never began", "job 1 is not in the queue")


def test_jobs_of_other_folders_are_told_by_name(
    here: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        put_in_queue(slurm, f"7_{i}|RUNNING|None|1|n{i}|0:03|1:00:00|N/A|embed|polyview:{here}/out")
    put_in_queue(slurm, f"8|PENDING|Dependency|1||0:00|1:00:00|N/A|build|polyview:{here}/out")
    put_in_queue(slurm, "9|PENDING|Priority|1||0:00|1:00:00|N/A|other|(null)")
    found = told(capsys)["runs"]
    assert [(one["run"], one["name"], one["jobs"]) for one in found] == [
        ("out", "embed", ["7_0", "7_1", "7_2"]), ("out", "build", ["8"]),
    ]  # fmt: skip
    assert "3 x job 7_0 on n0,n1,n2" in shown(capsys, "out")


def test_attempts_and_the_node_that_was_lost(
    here: Path, shards: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = here / "runs/a", here / "runs/a/slurm"
    assert main(["submit", str(recipe(here, shards))]) == 0
    records.append(folder, "began", job="1", restart=0, nodes=["n1", "n2"], silent=[])
    records.append(folder, "began", job="1", restart=1, nodes=["n1", "n3"], silent=["n2"])
    records.append(folder, "ended", job="1", restart=1, how="requeued")
    records.append(folder, "began", job="1", restart=2, nodes=["n1", "n3"], silent=[])
    records.append(folder, "ended", job="1", restart=2, how="failed: exit code 87")
    sacct = Path(slurm.path.partition(":")[0]) / "sacct"
    # sacct --duplicates -n -X -P -o JobID,State: a line an attempt, captured from Slurm 22.05.8
    sacct.write_text("#!/bin/sh\nprintf '1|NODE_FAIL\\n1|REQUEUED\\n1|FAILED\\n'\n")
    sacct.chmod(0o755)
    slurm.drop("1")
    details = told(capsys, run)["details"]
    assert [attempt["how"] for attempt in details["attempts"]] == [
        "cut off (NODE_FAIL)", "requeued", "failed: exit code 87 (loss or gradient not finite)",
    ]  # fmt: skip
    assert details["suspects"] == {"n2": 1}
    text = shown(capsys, run)
    assert f"to leave out: python -m slurm requeue {run} --exclude n2" in text
    assert f"logs:       {folder}/1_0_log.err" in text
    assert text.splitlines()[1].split()[1] == "failed"


def test_slurm_that_does_not_answer_hides_no_runs(
    here: Path, shards: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(recipe(here, shards)) == 0
    (Path(slurm.path.partition(":")[0]) / "squeue").write_text("#!/bin/sh\necho 'squeue: down' >&2\nexit 1\n")
    capsys.readouterr()
    assert main(["status"]) == 0
    said = capsys.readouterr()
    assert "Slurm does not answer (squeue --me --array: squeue: down)" in said.err
    assert "runs/a  done" in said.out


def test_what_is_no_run_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "nowhere"]) == 2
    assert "nowhere: no run is there" in capsys.readouterr().err


# ---------------------------------------------------------------- ranks


def sign(
    rank: int, phase: str = "backward", step: int = 81_204, since: float = 1.0, ago: float = 0.0
) -> dict[str, Any]:
    return {
        "rank": rank, "host": f"n{rank // 4}", "phase": phase, "step": step, "since": since, "time": 1e6 - ago,
        "every_s": 10.0,
    }  # fmt: skip


def test_the_rank_that_all_others_wait_for() -> None:
    signs = [sign(rank, since=350) for rank in range(8) if rank != 5] + [sign(5, "data", since=360)]
    assert ranks(signs, 8, 0.5, now=1e6) == [
        "rank 5 on n1 stands in data at step 81,204 for 6m00s",
        "7 others wait in backward at step 81,204 for 5m50s",
    ]
    assert ranks(signs, 8, 100.0, now=1e6) == []  # steps of that length are no standstill


def test_all_ranks_at_one_place() -> None:
    signs = [sign(rank, since=400 + rank) for rank in range(4)]
    assert ranks(signs, 4, 0.5, now=1e6) == ["4 ranks stand in backward at step 81,204 for 6m40s"]


def test_ranks_that_are_silent_or_missing() -> None:
    signs = [sign(0), sign(1, ago=360), sign(2, "end", ago=500)]
    assert ranks(signs, 8, 0.5, now=1e6) == [
        "rank 1 on n0 gave no sign of life for 6m00s (it was in backward at step 81,204)",
        "no sign of life yet of ranks 3-7",
    ]
    assert ranks([sign(rank) for rank in range(8)], 8, 0.5, now=1e6) == []


def signs_of(run: Path, **hosts: tuple[str, float]) -> None:
    """Signs of life of a rank on each of `hosts`: its phase, and seconds after the attempt began."""
    (run / "heartbeat").mkdir(exist_ok=True)
    began = records.attempts(run / "slurm")[-1].began
    for rank, (host, (phase, after_s)) in enumerate(hosts.items()):
        mine = sign(rank, phase) | {"host": host, "time": began + after_s}
        (run / f"heartbeat/rank_{rank:05d}.json").write_text(json.dumps(mine))


def test_nodes_that_fell_silent_before_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "slurm"
    records.append(folder, "began", job="1", restart=0, nodes=["n1", "n2", "n3"], silent=[])
    signs_of(tmp_path, n1=("backward", 500.0), n2=("backward", 430.0), n3=("backward", 495.0), n9=("data", 1.0))
    assert silent(tmp_path, folder) == ["n2"]  # more than four signs behind; n9 was not of this attempt
    signs_of(tmp_path, n1=("backward", 500.0), n2=("backward", 470.0), n3=("backward", 495.0))
    assert silent(tmp_path, folder) == []
    signs_of(tmp_path, n1=("end", 500.0), n2=("backward", 499.0), n3=("end", 500.0))
    assert silent(tmp_path, folder) == ["n2"]
    records.append(folder, "ended", job="1", restart=0, how="failed: exit code 85")
    assert silent(tmp_path, folder) == ["n2"]
    records.append(folder, "ended", job="1", restart=0, how="failed: exit code 87")
    assert silent(tmp_path, folder) == []


def test_hosts_that_call_themselves_by_their_long_name(tmp_path: Path) -> None:
    folder = tmp_path / "slurm"
    records.append(folder, "began", job="1", restart=0, nodes=["n1", "n2"], silent=[])
    hosts = {"n1.site.org": ("backward", 500.0), "n2.site.org": ("backward", 430.0), "n9.site.org": ("data", 1.0)}
    signs_of(tmp_path, **hosts)
    assert silent(tmp_path, folder) == ["n2"]
    signs_of(tmp_path, **hosts | {"n1.site.org": ("end", 500.0)})
    assert silent(tmp_path, folder) == ["n2"]


# ---------------------------------------------------------------- the end of the log


def write_log(run: Path, lines: list[dict[str, Any]]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def step_line(step: int, time_: float, loss: float | None = 1.0) -> dict[str, Any]:
    return {"step": step, "time": time_, "loss": loss, "images_per_s": 10.0, "step_s": 2.0, "grad_norm": 1.0}


def test_the_end_of_a_long_log_is_enough(tmp_path: Path) -> None:
    steps = [step_line(n, 100 + 3.0 * n) for n in range(1, 5000)]
    write_log(tmp_path, [{"event": "start", "step": 0, "total_steps": 9000}, *steps])
    (tmp_path / "recipe.yaml").write_text("name: x\nsteps: 10000\n")
    end = tail.read(tmp_path)
    assert (end.step, end.total, end.step_s) == (4999, 10_000, 3.0)
    assert end.eta_s == 5001 * 3.0
    (tmp_path / "recipe.yaml").write_text("name: x\nepochs: 3\n")
    assert tail.read(tmp_path).total == 9000
    before = (tmp_path / "log.jsonl").stat().st_size
    with open(tmp_path / "log.jsonl", "r+b") as log:
        log.write(b"\0" * (before - tail.BYTES))  # what comes before is not looked at
    assert tail.read(tmp_path).step_s == 3.0


def test_a_resume_begins_the_pace_anew(tmp_path: Path) -> None:
    old = [step_line(n, float(n)) for n in range(1, 9)]
    resumed = {"event": "resume", "step": 6, "total_steps": 20, "time": 5000.0}
    write_log(tmp_path, [{"event": "start", "step": 0, "total_steps": 10}, *old, resumed])
    assert (tail.read(tmp_path).step, tail.read(tmp_path).total, tail.read(tmp_path).saved) == (6, 20, 6)
    write_log(tmp_path, [*old, resumed, step_line(7, 5001.0), step_line(8, 5005.0, loss=None)])
    end = tail.read(tmp_path)
    assert (end.step, end.step_s, end.loss) == (8, 4.0, None)


def test_a_half_written_line_is_none(tmp_path: Path) -> None:
    write_log(tmp_path, [step_line(1, 1.0), step_line(2, 3.0)])
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 3, "ti')
    assert tail.read(tmp_path).step == 2


# ---------------------------------------------------------------- the door


@pytest.mark.parametrize("argv", [["status", "--help"], ["logs", "--help"], ["cancel", "--help"], ["status"]])
def test_it_answers_at_once(tmp_path: Path, argv: list[str]) -> None:
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/recipe.yaml").write_text("steps: 3\n")
    seconds = []
    for _ in range(3):  # the machine may be busy
        begin = time.perf_counter()
        command = [sys.executable, "-X", "importtime", "-m", "slurm", *argv]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        seconds.append(time.perf_counter() - begin)
    assert done.returncode == 0
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "pydantic", "submitit"}
    assert min(seconds) < 1
