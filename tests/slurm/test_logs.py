"""The log of a rank: its end, one attempt of it, and what is added while a run goes on."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from slurm import logs, records
from slurm.__main__ import main
from slurm.logfile import heading
from slurm.logs import Choice, follow, last_lines
from tests.slurm.queues import FakeSlurm
from tests.tiny import recipe_data, write_recipe, write_shards


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two attempts of job 7, on a machine without Slurm."""
    monkeypatch.setenv("PATH", "/nonexistent")
    folder = tmp_path / "run" / "slurm"
    records.append(folder, "submitted", job="7", name="tiny", nodes=1, ranks_per_node=2)
    (tmp_path / "run" / "recipe.yaml").write_text("steps: 9\n")
    for restart, how in enumerate(("requeued", "done")):
        records.append(folder, "began", job="7", restart=restart, nodes=["n1"], silent=[])
        records.append(folder, "ended", job="7", restart=restart, how=how)
    for rank in range(2):
        text = "".join(f"{heading('7', n, rank, 'n1')}\nwords of {n}\n" for n in range(2))
        (folder / f"7_{rank}_log.err").write_text(text)
    (folder / "7_0_log.out").write_text("submitit\n")
    return tmp_path / "run"


def said(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert main(["logs", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_which_log(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, run, "--lines", 1) == "words of 1\n"
    assert said(capsys, run).count("rank 0 on n1\n") == 2
    assert said(capsys, run, "--rank", 1).count("rank 1 on n1\n") == 2
    assert said(capsys, run, "--out") == "submitit\n"
    assert json.loads(said(capsys, run, "--json"))["file"] == str(run / "slurm/7_0_log.err")


def test_one_attempt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, run, "--attempt", 1) == f"{heading('7', 0, 0, 'n1')}\nwords of 0\n"
    assert said(capsys, run, "--attempt", 2, "--lines", 1) == "words of 1\n"
    assert main(["logs", str(run), "--attempt", "3"]) == 2
    assert "--attempt 3:" in capsys.readouterr().err


def test_an_element_of_an_array_keeps_its_log_with_the_array(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    together = run.parent / "slurm"
    records.append(run / "slurm", "submitted", job="9_3", name="tiny", logs=str(together))
    together.mkdir()
    (together / "9_3_0_log.err").write_text("of the array\n")
    assert said(capsys, run) == "of the array\n"


def test_what_is_not_there_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", str(run), "--rank", "5"]) == 2
    assert "job 7 has logs of ranks 0 to 1" in capsys.readouterr().err
    assert main(["logs", str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text("steps: 9\n")
    assert main(["logs", str(tmp_path)]) == 2
    assert "no job of it was ever submitted" in capsys.readouterr().err


def test_a_job_that_waits_is_told_with_its_reason(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("PATH", slurm.path)
    records.append(run / "slurm", "submitted", job="8", name="tiny")
    (tmp_path / "fake/queue").write_text(f"8|PENDING|Resources|1||0:00|1:00:00|N/A|tiny|polyview:{run}\n")
    assert main(["logs", str(run)]) == 2
    assert "job 8 has not begun: waits for free nodes" in capsys.readouterr().err


def test_last_lines_of_a_file_of_any_size(tmp_path: Path) -> None:
    file = tmp_path / "log"
    lines = [f"line {n} {'x' * 50}\n".encode() for n in range(5000)]
    file.write_bytes(b"".join(lines))
    assert last_lines(file, 2000) == b"".join(lines[-2000:])
    assert last_lines(file, 9999) == b"".join(lines)
    assert last_lines(file, 0) == b""
    assert last_lines(file, 1, size=len(lines[0])) == lines[0]
    file.write_bytes(b"no end")
    assert last_lines(file, 5) == b"no end"


def test_following_goes_on_over_a_requeue_and_a_new_job(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("PATH", slurm.path)
    monkeypatch.setattr(logs, "ASK_S", 0.05)
    monkeypatch.setattr(logs, "POLL_S", 0.02)
    queue = tmp_path / "fake/queue"
    queue.write_text(f"7|RUNNING|None|1|n1|0:01|1:00:00|N/A|tiny|polyview:{run}\n")
    text, told = bytearray(), list[str]()

    def read() -> None:
        for part in follow(Choice(run), 1, told.append):
            text.extend(part)

    reader = threading.Thread(target=read)
    reader.start()

    def wait_for(what: bytes) -> None:
        patience = time.monotonic() + 30
        while what not in text:
            assert time.monotonic() < patience, (bytes(text), told)
            time.sleep(0.01)

    def say(job: str, words: str) -> None:
        with open(run / f"slurm/{job}_0_log.err", "a") as log:
            log.write(words)

    wait_for(b"words of 1\n")
    queue.write_text(f"7|PENDING|BeginTime|1||0:00|1:00:00|N/A|tiny|polyview:{run}\n")
    patience = time.monotonic() + 30
    while not any("job 7 waits: may not begin yet" in line for line in told):
        assert time.monotonic() < patience
        time.sleep(0.01)
    say("7", "back again\n")
    wait_for(b"back again\n")
    records.append(run / "slurm", "submitted", job="8", name="tiny")
    queue.write_text(f"8|RUNNING|None|1|n1|0:01|1:00:00|N/A|tiny|polyview:{run}\n")
    say("8", "a new job\n")
    wait_for(b"a new job\n")
    records.append(run / "slurm", "began", job="8", restart=0, nodes=["n1"], silent=[])
    records.append(run / "slurm", "ended", job="8", restart=0, how="done")
    say("8", "its last word\n")
    queue.write_text("")
    reader.join(30)
    assert not reader.is_alive()
    assert bytes(text) == b"words of 1\nback again\na new job\nits last word\n"
    assert f"==> {run / 'slurm/8_0_log.err'} <==" in told


def test_following_a_real_job_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "shards", samples=24)
    recipe = write_recipe(tmp_path / "r.yaml", recipe_data(shards, tmp_path / "run", steps=2))
    monkeypatch.setattr(logs, "ASK_S", 0.5)
    assert main(["submit", str(recipe), "--local"]) == 0  # it has not begun when it is followed
    assert main(["logs", str(tmp_path / "run"), "-f"]) == 0
    assert "step 2/2" in capsys.readouterr().out
