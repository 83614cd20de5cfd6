"""The page of a run: curves of bounded size that keep spikes, a state that is true, nothing that a log can break."""

from __future__ import annotations

import fcntl
import io
import json
import platform
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from pretrain.__main__ import main
from pretrain.errors import UserError
from pretrain.telemetry import RunLog, RunPage, read_log, write_page
from pretrain.telemetry.figures import GROUPS, about, group
from pretrain.telemetry.history import MOST_EVENTS, MOST_STRETCHES, Curve, History
from tests import tiny
from tests.runs import train_here

HOSTILE = "</script><script>document.title='broken'</script>"


def make_run(folder: Path, steps: int = 30, name: str = "tiny", ends: str | None = "end") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(f"name: {json.dumps(name)}\nseed: 0\n")
    (folder / "run.json").write_text(
        json.dumps([{"host": name, "from_step": 0, "world": 2, "versions": {"torch": "2"}}])
    )
    with RunLog(folder, total_steps=40, tensorboard=False, stream=io.StringIO()) as log:
        for step in range(1, steps + 1):
            line = {"loss": 1 / step, "loss/clip": 1 / step, "lr": 0.1, "step_s": 2.0, "rankme/main": 7.0}
            log.step(step, line | {"time/data_s": 0.5, "time/forward_s": 1.5, "mfu": 0.415, "grad_norm": float("nan")})
        log.event("warning", step=steps, message=name)
        if ends:
            log.event(ends)
    return folder


# --- curves


def test_a_curve_is_bounded_and_keeps_every_spike() -> None:
    random.seed(0)
    curve, spikes = Curve(), {70_001: 50.0, 123_456: -50.0, 199_999: 60.0}
    for step in range(200_000):
        curve.add(step, spikes.get(step, random.random()))
    points = curve.points()
    assert len(points) <= 2 * MOST_STRETCHES + 1
    assert len(points) > MOST_STRETCHES / 2
    assert points == sorted(points)
    assert set(spikes.items()) <= set(points)
    assert points[-1][0] == 199_999
    curve.cut(100_000)
    assert max(step for step, _ in curve.points()) <= 100_000
    assert (70_001, 50.0) in curve.points()


def test_the_history_of_a_resumed_run_is_the_log_as_it_stands(tmp_path: Path) -> None:
    run, history = tmp_path / "run", History(tmp_path / "run" / "log.jsonl")
    for resume, steps in ((None, range(1, 41)), (20, range(21, 35)), (30, range(31, 61))):
        with RunLog(run, total_steps=60, resume_step=resume, tensorboard=False, stream=io.StringIO()) as log:
            for step in steps:
                log.step(step, {"loss": step + (resume or 0) / 100, "grad_norm": None if step == 25 else 1.0})
        history.update()
        stands = read_log(run)
        assert history.curves["loss"].points() == [(r["step"], r["loss"]) for r in stands]
        assert len(history.curves["grad_norm"].points()) == sum(r["grad_norm"] is not None for r in stands)
        assert history.line == stands[-1]
    whole = History(run / "log.jsonl")
    whole.update()
    assert whole.curves["loss"].points() == history.curves["loss"].points()


def test_a_half_written_line_waits_for_its_end(tmp_path: Path) -> None:
    file, history = tmp_path / "log.jsonl", History(tmp_path / "log.jsonl")
    history.update()
    assert not history.curves
    file.write_text('{"step": 1, "loss": 2.0}\n[3]\n{broken\n{"step": 2, "lo')
    history.update()
    assert history.curves["loss"].points() == [(1, 2.0)]
    with file.open("a") as log:
        log.write('ss": 1.0}\n')
    history.update()
    assert history.curves["loss"].points() == [(1, 2.0), (2, 1.0)]


def test_events_without_end_leave_the_rare_ones(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    lines = [{"event": "save", "step": i} for i in range(5000)]
    lines.insert(10, {"event": "spike", "step": 10})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = History(file)
    history.update()
    assert len(history.events) <= 2 * MOST_EVENTS
    assert [e["step"] for e in history.events if e["event"] == "spike"] == [10]
    assert history.events[-1]["step"] == 4999
    assert history.counts == {"save": 5000, "spike": 1}


def test_every_figure_has_a_title_and_a_place() -> None:
    assert about("clip/logit_scale")[0] == "Scale (1 / temperature): clip"
    assert about("rankme/main")[0] == "RankMe: main"
    assert about("loss/swav")[0] == "Loss: swav"
    assert about("eval/knn_top1")[0] == "knn_top1"
    assert about("my.objective/new") == ("my.objective/new", "")
    assert {group(k) for k in ("loss", "eval/x", "lr", "rankme/a", "swav/x", "mfu", "memory_gib", "time/a_s")} == set(
        GROUPS
    )


# --- the page


def test_the_page_says_where_the_run_is(tmp_path: Path) -> None:
    text = write_page(make_run(tmp_path / "run")).read_text()
    for told in ("30 of 40", "41.5%", "finished", "data: 25.0 %, 0.5 s a step", "seed: 0", "torch 2", "RankMe: main"):
        assert told in text, told
    assert 'http-equiv="refresh"' not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert [[s, 1 / s] for s in (1, 2, 4)] == [p for p in data["curves"][0] if p[0] in (1, 2, 4)]
    assert "src=" not in text
    assert "http:" not in text.replace("http://www.w3.org/2000/svg", "")


def test_the_state_is_what_the_run_and_its_signs_of_life_say(tmp_path: Path) -> None:
    def state() -> str:
        return re.search(r'<span class="tag [a-z]*">([^<]*)</span>', RunPage(tmp_path).html())[1]

    make_run(tmp_path, ends=None)
    assert state() == "ended without a word"
    with open(tmp_path / "LOCK", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert state() == "running"
        assert 'http-equiv="refresh"' in RunPage(tmp_path).html()
    beat = {"rank": 0, "host": platform.node(), "pid": 2**22 + 1, "phase": "data", "time": time.time()}
    (tmp_path / "heartbeat").mkdir()
    file = tmp_path / "heartbeat" / "rank_00000.json"
    file.write_text(json.dumps(beat))
    assert state() == "ended without a word", "its process is gone"
    file.write_text(json.dumps(beat | {"host": "elsewhere"}))
    assert state() == "running"
    file.write_text(json.dumps(beat | {"host": "elsewhere", "time": time.time() - 3600}))
    assert state() == "ended without a word"
    make_run(tmp_path, ends="stop")
    assert state() == "stopped"
    (tmp_path / "log.jsonl").unlink()
    assert state() == "not begun"


def test_writing_rests_after_it_took_time_and_survives_a_full_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = RunPage(make_run(tmp_path / "run"))
    page.write()
    first = (tmp_path / "run/index.html").stat().st_mtime_ns
    page.write()
    assert (tmp_path / "run/index.html").stat().st_mtime_ns == first
    page.write(now=True)
    assert (tmp_path / "run/index.html").stat().st_mtime_ns > first
    (tmp_path / "full").write_text("a file where a folder should be")
    nowhere = RunPage(tmp_path / "run", tmp_path / "full" / "index.html")
    nowhere.write(now=True)
    nowhere.write(now=True)
    assert caplog.text.count("is not up to date") == 1


def test_the_door_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["page", str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err
    make_run(tmp_path / "run")
    assert main(["page", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file()
    with pytest.raises(UserError, match="--out"):
        write_page(tmp_path / "run", tmp_path / "missing" / "page.html")


def test_training_keeps_its_page_up_to_date(tmp_path: Path) -> None:
    shards = tiny.write_shards(tmp_path / "shards")
    assert train_here(tiny.write_recipe(tmp_path / "r.yaml", tiny.recipe_data(shards, tmp_path / "run"))) == 0
    text = (tmp_path / "run/index.html").read_text()
    for told in ("8 of 8", "finished", "Where a step", "Time: backward", "TFLOP/s a rank"):
        assert told in text, told
    line = read_log(tmp_path / "run")[-1]
    spent = sum(v for k, v in line.items() if k.startswith("time/"))
    assert spent == pytest.approx(line["step_s"], rel=0.1), "every moment of a step is in a phase"


def test_a_browser_draws_every_curve_and_obeys_no_name(tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on this machine (make ci-deps installs it)")
    page = write_page(make_run(tmp_path / "run", steps=200, name=HOSTILE))
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    local = [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    done = subprocess.run([browser, *quiet, *local], capture_output=True, text=True, timeout=120)
    assert "<title>&lt;/script&gt;" in done.stdout, done.stdout[:500] + done.stderr[-500:]
    curves = re.findall(r'<svg class="curve".*?</svg>', done.stdout, re.DOTALL)
    assert len(curves) == 8
    assert all(svg.count("<path") == 2 for svg in curves), "as it was, and smoothed"
    assert all("NaN" not in svg and "<title>warning, step 200" in svg for svg in curves)
