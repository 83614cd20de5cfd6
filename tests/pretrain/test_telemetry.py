"""The run log survives crashes, resumes and NaN; the signals are what their papers say; the progress line
tells.
"""

from __future__ import annotations

import builtins
import io
import json
import logging
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.telemetry.progress import Progress, duration
from pretrain.telemetry.provenance import git_state, provenance
from pretrain.telemetry.runlog import RunLog, read_events, read_log
from pretrain.telemetry.signals import embedding_std, rankme

# --- run log


def open_log(run: Path, resume_step: int | None = None, **options) -> RunLog:
    options = {"tensorboard": False, "stream": io.StringIO()} | options
    return RunLog(run, total_steps=100, resume_step=resume_step, **options)


def test_what_is_logged_is_read_back(tmp_path: Path) -> None:
    with open_log(tmp_path) as runlog:
        runlog.step(10, {"loss": torch.tensor(1.5), "loss/clip": np.float32(0.5), "samples_seen": 640, "epoch": 0.1})
        runlog.event("save", step=10, path=tmp_path)
        runlog.event("stop", step=10, reason="done")
    (record,) = read_log(tmp_path)
    assert record.pop("time") > 1.7e9
    assert record == {"step": 10, "loss": 1.5, "loss/clip": 0.5, "samples_seen": 640, "epoch": 0.1}
    assert [e["event"] for e in read_events(tmp_path)] == ["start", "save", "stop"]
    assert read_events(tmp_path)[-1]["reason"] == "done"
    assert read_log(tmp_path / "log.jsonl") == read_log(tmp_path)


def test_a_resume_overtakes_later_steps_and_loses_no_line(tmp_path: Path) -> None:
    with open_log(tmp_path) as runlog:
        for step in (10, 20, 30, 40):
            runlog.step(step, {"loss": 1.0})
    before = (tmp_path / "log.jsonl").read_bytes()
    with open_log(tmp_path, resume_step=20) as runlog:
        runlog.step(30, {"loss": 2.0})
    assert [(r["step"], r["loss"]) for r in read_log(tmp_path)] == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert (tmp_path / "log.jsonl").read_bytes().startswith(before)
    with open_log(tmp_path) as runlog:  # from nothing, in the same folder
        runlog.step(10, {"loss": 3.0})
        runlog.step(10, {"loss": 4.0})
    assert [(r["step"], r["loss"]) for r in read_log(tmp_path)] == [(10, 4.0)]


def test_a_half_written_line_costs_only_itself(tmp_path: Path) -> None:
    with open_log(tmp_path) as runlog:
        runlog.step(1, {"loss": 1.0})
        runlog.step(2, {"loss": 2.0})
    file = tmp_path / "log.jsonl"
    file.write_bytes(file.read_bytes()[:-7])
    assert [r["step"] for r in read_log(tmp_path)] == [1]
    with open_log(tmp_path, resume_step=1) as runlog:
        runlog.step(2, {"loss": 3.0})
    assert [(r["step"], r["loss"]) for r in read_log(tmp_path)] == [(1, 1.0), (2, 3.0)]


def test_what_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    def strict(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    with open_log(tmp_path) as runlog:
        runlog.step(1, {"loss": torch.tensor(float("nan")), "grad_norm": float("inf"), "lr": 0.1, "beta": (0.9, 0.99)})
        runlog.event("spike", per_rank={"loss": [1.0, float("-inf")]})
    lines = [json.loads(line, parse_constant=strict) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[1]["loss"] is None
    assert lines[1]["nonfinite"] == ["loss", "grad_norm"]
    assert lines[1]["lr"] == 0.1
    assert lines[2]["per_rank"] == {"loss": [1.0, None]}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with open_log(tmp_path / "run", rank=1) as runlog:
        runlog.step(1, {"loss": 1.0})
        runlog.event("save", step=1)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_log(tmp_path) as runlog:
        runlog.step(1, {"loss": 1.0})
        try:
            size = (tmp_path / "log.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
            with caplog.at_level(logging.WARNING):
                runlog.step(2, {"loss": 2.0})
                runlog.step(3, {"loss": 3.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        runlog.step(4, {"loss": 4.0})
    assert "step not logged" in caplog.text
    assert [r["step"] for r in read_log(tmp_path)] == [1, 4]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning", "ignore::ResourceWarning")
def test_a_full_disk_ends_tensorboard_but_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_log(tmp_path, tensorboard=True) as runlog:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
            with caplog.at_level(logging.WARNING):
                for step in range(1, 2000):  # its thread meets the disk some time after the call
                    runlog.step(step, {f"signal{i}": 1.0 for i in range(50)})
                    if "TensorBoard gets no more" in caplog.text:
                        break
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        runlog.step(5000, {"loss": 4.0})
    assert "TensorBoard gets no more" in caplog.text
    assert [r["step"] for r in read_log(tmp_path)][-1] == 5000


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume, steps in ((None, (1, 2, 3)), (1, (2, 3, 4))):
        with open_log(tmp_path, resume, tensorboard=True) as runlog:
            for step in steps:
                runlog.step(step, {"loss": 10.0 * (resume or 0) + step, "lr": 0.5, "samples_seen": step})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr"}
    shown = {e.step: e.value for e in events.Scalars("loss")}
    assert shown == {r["step"]: r["loss"] for r in read_log(tmp_path)} == {1: 1, 2: 12, 3: 13, 4: 14}


def test_tensorboard_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def without(name: str, *rest, **more):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with open_log(tmp_path, tensorboard=True) as runlog:
        runlog.step(1, {"loss": 1.0})
    assert "TensorBoard is not installed" in caplog.text
    assert len(read_log(tmp_path)) == 1


def test_tensorboard_is_not_imported_unless_used() -> None:
    code = "import sys, pretrain.telemetry.runlog; sys.exit(any('tensorboard' in m for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_the_first_line_then_few_and_the_last() -> None:
    out, now = io.StringIO(), [0.0]
    progress = Progress(100, stream=out, clock=lambda: now[0])
    for step in range(1, 101):
        now[0] += 0.5
        if step == 60:
            progress.saved(50)
        progress.update(step, {"loss": 2.0, "images_per_s": 1234.5, "data_wait": 0.031})
    progress.close()
    lines = out.getvalue().splitlines()
    assert [line.split(" · ")[0] for line in lines] == [f"step {s}/100" for s in (1, 21, 41, 61, 81, 100)]
    assert lines[3] == "step 61/100 · loss 2 · 1,234 images/s · data wait 3% · ETA 20s · saved 50"
    assert "saved" not in lines[2]
    assert lines[-1].endswith("ETA 0s · saved 50")


def test_a_terminal_gets_one_line_rewritten() -> None:
    out, now = Terminal(), [0.0]
    progress = Progress(1000, stream=out, clock=lambda: now[0])
    for step in range(1, 21):
        now[0] += 60
        progress.update(step, {"loss": float("nan") if step == 20 else 1.0})
    progress.close()
    assert out.getvalue().count("\n") == 1
    last = out.getvalue().rsplit("\r", 1)[1]
    assert last.startswith("step 20/1,000 · loss nan · ETA 16h20m")


def test_what_was_held_back_is_shown_at_the_end() -> None:
    out = io.StringIO()
    progress = Progress(100, stream=out, clock=lambda: 0.0)
    for step in (1, 2, 3):
        progress.update(step, {})
    assert "step 3" not in out.getvalue()
    progress.close()
    progress.close()
    assert out.getvalue().splitlines() == ["step 1/100", "step 3/100 · ETA 0s"]


def test_durations() -> None:
    seconds = [0, 59.6, 200, 3600, 5 * 3600 + 420, 2 * 86400 + 4 * 3600]
    assert [duration(s) for s in seconds] == ["0s", "1m00s", "3m20s", "1h00m", "5h07m", "2d04h"]


# --- signals


def test_rankme_is_the_papers_formula() -> None:
    rng = np.random.default_rng(0)
    for n, d in ((64, 16), (16, 64), (200, 50)):
        x = rng.normal(size=(n, d)) * rng.exponential(size=d) + 0.5
        sigma = np.linalg.svd(x, compute_uv=False)
        p = sigma / np.abs(sigma).sum() + 1e-7
        expected = np.exp(-(p * np.log(p)).sum())
        assert rankme(torch.tensor(x)) == pytest.approx(expected, rel=1e-9)
        assert rankme(torch.tensor(x, dtype=torch.float32)) == pytest.approx(expected, rel=1e-4)
        assert 1 <= rankme(torch.tensor(x, dtype=torch.bfloat16)) <= min(n, d) + 1e-3


def test_rankme_counts_directions() -> None:
    assert rankme(torch.eye(32)) == pytest.approx(32, rel=1e-3)
    assert rankme(torch.ones(100, 32)) == pytest.approx(1, rel=1e-3)
    half = torch.randn(1000, 8) @ torch.linalg.qr(torch.randn(32, 8)).Q.T
    assert rankme(half) == pytest.approx(8, rel=0.02)
    assert rankme(torch.zeros(10, 4)) == pytest.approx(1, rel=1e-3)
    assert np.isnan(rankme(torch.empty(0, 4)))
    assert np.isnan(rankme(torch.tensor([[1.0, float("inf")]])))
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        rankme(torch.zeros(3))


def test_embedding_std_is_simsiams() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 24)) * 7 + 1
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert embedding_std(torch.tensor(x)) == pytest.approx(unit.std(axis=0, ddof=1).mean(), rel=1e-9)
    assert embedding_std(torch.randn(20_000, 64)) == pytest.approx(1 / 8, rel=0.01)
    assert embedding_std(torch.ones(50, 64)) == pytest.approx(0, abs=1e-6)
    assert embedding_std(torch.randn(1, 8)) == 0
    assert np.isnan(embedding_std(torch.empty(0, 8)))


# --- provenance


def test_provenance_is_json_and_says_what_ran() -> None:
    p = json.loads(json.dumps(provenance(["polyview", "train", "x.yaml"])))
    assert p["command"] == ["polyview", "train", "x.yaml"]
    assert p["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert p["versions"]["polyview"]
    assert p["host"]
    assert p["date"].endswith("+00:00")
    assert provenance()["command"] == sys.orig_argv


def test_commit_and_dirt_of_a_checkout(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@t"]
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert git_state(tmp_path) is None
    git("init", "-q")
    assert git_state(tmp_path) is None, "no commit yet"
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg/a.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "one")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "pkg/a.py").write_text("2")
    assert git_state(tmp_path)["dirty"]
    assert git_state(tmp_path / "pkg") is None, "installed inside somebody else's repository"
