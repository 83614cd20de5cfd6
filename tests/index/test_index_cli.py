"""The verbs as a person runs them, in one process: what they print and how they fail."""

from __future__ import annotations

import subprocess
import sys

import pytest

from index.__main__ import DOC, VERBS
from pretrain import cli
from tests.tiny import picture


def index(*argv: object) -> int:
    return cli.main("index", DOC, VERBS, [str(a) for a in argv])


def test_the_whole_way(run, shards, tmp_path, capsys):
    e, c = tmp_path / "e", tmp_path / "c"
    assert index("embed", run, shards, "--out", e, "--batch", 16) == 0
    assert "61 rows + 1 skipped = 62 members" in capsys.readouterr().out
    assert index("embed", run, shards, "--out", e, "--batch", 16) == 0
    assert "3 tars (3 done before)" in capsys.readouterr().out
    assert index("build", c, "--from", e) == 0
    assert index("search", c, "--text", "red") == 2
    assert "nothing is published yet" in capsys.readouterr().err
    assert index("publish", c) == 0
    assert index("info", c) == 0
    told = capsys.readouterr().out
    assert "61 rows + 1 skipped = 62 members" in told
    assert str(run) in told
    assert "000001  61 rows" in told
    page = tmp_path / "hits.html"
    assert index("search", c, "--key", "s0007", "-k", 3, "--html", page) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rank", "score", "id", "key", "caption"]
    assert lines[1].split()[2:4] == ["7", "s0007"]
    assert page.read_text().count("data:image/jpeg") == 3


def test_search_by_text_image_id_and_filter(published, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(picture(3))
    assert index("search", published, "--image", tmp_path / "a.png", "-k", 1) == 0
    assert " s0003 " in capsys.readouterr().out
    assert index("search", published, "--text", "a red thing", "-k", 2, "--filter", '{"label": 2}') == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert index("search", published, "--id", 12, "-k", 1) == 0
    assert " s0012 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["search", "C", "--id", "999"], "no image with id 999"),
        (["search", "C", "--text", "a", "--filter", "label=3"], "is not JSON"),
        (["search", "C", "--text", "a", "-k", "0"], "k must be"),
        (["search", "C", "--image", "nowhere.png"], "nowhere.png"),
        (["search", "C", "--id", "1", "--encoder", "OTHER"], "was built with encoder"),
        (["search", "C", "--id", "1", "--version", "../x"], "no version"),
        (["publish", "C", "--version", "000009"], "no version '000009'"),
        (["info", "nowhere"], "holds no version"),
        (["build", "C", "--from", "nowhere"], "no finished unit"),
        (["embed", "nowhere", "S", "--out", "x"], "nowhere"),
    ],
)
def test_errors_are_for_people(published, other_run, shards, argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"C": published, "OTHER": other_run, "S": shards}
    assert index(*(names.get(a, a) for a in argv)) == 2
    assert says in capsys.readouterr().err


def test_ranks_share_the_tars(run, shards, tmp_path):
    for rank in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "index", "embed", str(run), str(shards), "--out", str(tmp_path / "e")],
            env={"PATH": "", "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert f"rank {rank} of 2:" in done.stdout
    assert index("build", tmp_path / "c", "--from", tmp_path / "e") == 0
