"""The report: one sound page, nothing loaded, nothing from data able to change it, every figure explained."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from downstream.__main__ import main
from downstream.report import charts, confusion, curves, scatter
from downstream.report.glossary import meaning
from downstream.report.markup import image, share
from downstream.report.page import collect, page
from downstream.report.tables import columns, verdict
from downstream.results import Result, write
from pretrain.markup import esc, number
from tests.tiny import recipe_data

VOID = {"meta", "img", "br", "line", "circle", "rect", "path", "input"}
HOSTILE = '"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)> \u202e\x00 & \ud800'
PIXEL = "data:image/jpeg;base64,/9j/4AAQ"


class Sound(HTMLParser):
    """Checks that tags close in order; keeps tags, addresses and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def retrieval(name: str = "tiny@step_00000008", role: str = "trained", value: float = 0.5, **changes) -> Result:
    metrics = {
        "image_retrieval_recall@1": value,
        "image_retrieval_recall@5": value,
        "image_retrieval_median_rank": 7.0,
    }
    given = {
        "dataset": "flickr",
        "model": "vit",
        "pretrained": name,
        "task": "zeroshot_retrieval",
        "metrics": metrics,
        "intervals": {k: [v * 0.9, v * 1.1] for k, v in metrics.items()},
        "chance": {
            "image_retrieval_recall@1": 0.01,
            "image_retrieval_recall@5": 0.05,
            "image_retrieval_median_rank": 50,
        },
        "details": {
            "run": "tiny",
            "role": role,
            "step": 8,
            "notes": ["1 image left out"],
            "intervals": "95 %",
        },
    }
    return Result(**(given | changes))


def pictures(text: str = "a dog") -> dict:
    found = [{"src": PIXEL, "score": 0.5, "place": 1, "right": True, "name": text}]
    return {
        "chosen": "Drawn at random.",
        "captions": [{"text": text, "rank": 1, "of": 100, "found": found}],
        "photographs": [{"src": PIXEL, "rank": 2, "of": 500, "found": [{"text": text, "right": False}]}],
        "named": [{"src": "http://evil.example/x.jpg", "rank": 1, "of": 3, "found": [{"text": text, "right": True}]}],
        "neighbours": [{"src": PIXEL, "name": text, "predicted": text, "hit": False, "found": found}],
        "confusion": {
            "classes": [text, "b"],
            "counts": [[3, 1], [0, 4]],
            "mistakes": [[text, "b", 1, 4]],
            "recalls": [[text, 0.75, 4], ["b", None, 0]],
        },
        "map": {
            "method": "PCA",
            "by": "class",
            "classes": [text, "b"],
            "points": [[0.1, 0.2, 0, PIXEL], [1, 0, -1, None]],
        },
    }


LOG = [
    {"step": s, "time": 0.0, "loss": 4 / s, "loss/clip": 4 / s, "lr": 1e-3, "clip/logit_scale": 14.0}
    for s in range(1, 9)
]


def render(folder: Path, *, run: str = "tiny", lines=LOG) -> str:
    return page(run, {"Model": "vit", "Samples seen": 96, "Final loss": 0.5, "Epochs": None}, lines, collect([folder]))


def test_the_page_is_sound_and_loads_nothing(tmp_path: Path) -> None:
    write(retrieval(), tmp_path, pictures())
    write(retrieval("untrained", "untrained", 0.1), tmp_path, pictures())
    text = render(tmp_path)
    sound = Sound(text)
    assert not re.search(r"(?:https?:)?//[a-z]", text), "an address in the page"
    for tag, attributes in sound.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "data-src", "action", "srcset", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, attributes)
    policy = next(a["content"] for t, a in sound.tags if t == "meta" and a.get("http-equiv"))
    assert "default-src 'none'" in policy


def test_nothing_from_data_can_change_the_page(tmp_path: Path) -> None:
    bad = retrieval(HOSTILE, model=HOSTILE, dataset=HOSTILE, metrics={HOSTILE: 0.5, "acc1": 0.5})
    bad.details |= {"notes": [HOSTILE], "counts": {HOSTILE: 5}, "intervals": HOSTILE, "fingerprint": HOSTILE}
    data = pictures(HOSTILE)
    data["map"]["points"].append([0.1, 0.2, 0, '" onload="alert(3)'])
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(bad.as_dict()))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/bad.json").write_text(json.dumps(data))
    lines = [{"step": 1, HOSTILE: 1.0, "loss": 2.0}]
    sound = Sound(page(HOSTILE, {HOSTILE: HOSTILE}, lines, collect([tmp_path])))
    assert [t for t, _ in sound.tags].count("script") == 1
    assert not [a for _, a in sound.tags if any(name.startswith("on") for name in a)]
    assert not [a for t, a in sound.tags if t == "img" and not a["src"].startswith("data:image/")]
    assert "alert(1)" in sound.text  # shown, not run
    assert "\x00" not in sound.text


def test_every_figure_stands_with_its_meaning_its_interval_and_chance(tmp_path: Path) -> None:
    write(retrieval(), tmp_path)
    text = Sound(render(tmp_path)).text
    for shown in (
        "50.0\xa0%",
        "45.0 – 55.0",
        "1.0\xa0%",
        "Share of captions whose own photograph comes first.",
        "1 image left out",
    ):
        assert shown in text


def test_the_untrained_encoder_and_a_control_stand_beside_the_run(tmp_path: Path) -> None:
    control = retrieval("shuffled@step_00000008", value=0.2)
    control.details["run"] = "shuffled"
    given = [control, retrieval("untrained", "untrained", 0.1), retrieval()]
    cols = columns(given, "tiny")
    assert [c.name for c in cols] == ["tiny@step_00000008", "untrained", "shuffled@step_00000008"]
    assert [c.own for c in cols] == [True, False, False]
    assert verdict(cols, "image_retrieval_recall@1") == "50 times chance, clearly above the untrained encoder."
    near = [retrieval(value=0.11), retrieval("untrained", "untrained", 0.1)]
    assert "not clearly apart from" in verdict(columns(near, "tiny"), "image_retrieval_recall@1")
    for result in given:
        write(result, tmp_path)
    assert "shuffled@step_00000008" in Sound(render(tmp_path)).text


def test_without_results_or_log_the_page_says_what_to_do(tmp_path: Path) -> None:
    text = Sound(render(tmp_path, lines=[])).text
    assert "No evaluation results were given" in text
    assert "has logged no steps yet" in text


def test_files_that_are_no_results_are_passed_over_and_named(tmp_path: Path) -> None:
    write(retrieval(), tmp_path)
    (tmp_path / "other.json").write_text("[1]")
    found = collect([tmp_path])
    assert len(found.results) == 1
    assert "other.json" in Sound(render(tmp_path)).text


def test_the_door_writes_the_page_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe_data(tmp_path / "data", run)))
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    write(retrieval(), run / "results", pictures())
    assert main(["report", str(run), "--out", str(tmp_path / "new/report.html")]) == 0
    text = (tmp_path / "new/report.html").read_text("utf-8")
    assert "Loss: clip" in Sound(text).text
    assert "What captions find" in text
    assert main(["report", str(tmp_path / "nothing"), "--out", str(tmp_path / "x.html")]) == 2
    assert main(["report", str(run), "--results", str(tmp_path / "no"), "--out", str(tmp_path / "x.html")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_curves_keep_spikes_and_leave_out_what_is_not_finite() -> None:
    lines = [{"step": s, "loss": 9.0 if s == 700 else 1.0, "nested": {"x": s}} for s in range(5000)]
    lines.append({"step": 5000, "loss": None, "grad_norm": float("nan"), "flag": True, "name": "x"})
    found = curves.series(lines)
    assert set(found) == {"loss", "nested.x"}
    thin = charts.thin(found["loss"], 300)
    assert len(thin) <= 300
    assert (700.0, 9.0) in thin
    assert thin[0][0] == 0
    assert thin[-1][0] == 4999
    Sound(curves.section(lines))
    Sound(curves.section([{"step": 3, "loss": 2.0}]))


def test_of_one_step_logged_twice_the_last_holds() -> None:
    assert curves.series([{"step": 2, "loss": 1.0}, {"step": 1, "loss": 5.0}, {"step": 2, "loss": 3.0}])["loss"] == [
        (1, 5),
        (2, 3),
    ]


@pytest.mark.parametrize("values", [[0.0, 1.0], [3.0, 3.0], [0.0, 0.0], [-5e-9, 4e-9], [1e6, 3e7], [99.0, 101.0]])
def test_axes_hold_their_values(values: list[float]) -> None:
    ticks = charts.scale(values)
    assert ticks[0] <= min(values)
    assert ticks[-1] >= max(values)
    assert 2 <= len(ticks) <= 8


def test_figures_are_readable() -> None:
    values = (0.0, 1.0, 12345.0, 0.5, 0.00012, 5e-5, 1.2345, 56.789, float("nan"), None)
    shown = ["0", "1", "12,345", "0.5", "0.00012", "5e-5", "1.234", "56.79", "–", "–"]
    assert [number(v) for v in values] == shown
    assert share(0.123) == "12.3\xa0%"
    assert share(0.00456) == "0.46\xa0%"
    assert "first 5" in meaning("text_retrieval_recall@5").line
    assert "20 nearest" in meaning("k20_acc1").line
    assert meaning("map50").label == "map50"


def test_pictures_are_bytes_never_addresses() -> None:
    assert "<img" in image(PIXEL)
    for bad in (
        "http://x/y.jpg",
        "javascript:1",
        "data:text/html;base64,AAAA",
        'data:image/png;base64,AA"onload=',
        None,
        3,
    ):
        assert "<img" not in image(bad, HOSTILE)
    assert esc("<&\"'>") == "&lt;&amp;&quot;&#x27;&gt;"


def test_many_classes_give_pairs_instead_of_a_matrix(tmp_path: Path) -> None:
    data = pictures()
    data["confusion"]["counts"] = None
    write(retrieval(), tmp_path, data)
    sound = Sound(render(tmp_path))
    assert "Most frequent mistakes" in sound.text
    assert "confusion matrix" not in [a.get("aria-label") for _, a in sound.tags]
    assert confusion.matrix([[0]], ["x"])
    assert len({scatter.colour(i, 10) for i in range(10)}) == 10


@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_shows_the_page_without_a_sideways_scroll(tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on this machine (make ci-deps installs it)")
    write(retrieval(), tmp_path / "results", pictures())
    # the page's own policy forbids scripts of strangers; the measure is taken from outside it, in a frame
    (tmp_path / "report.html").write_text(render(tmp_path / "results"))
    (tmp_path / "frame.html").write_text(
        f'<iframe id=f src=report.html style="width:{width}px;height:900px"></iframe><script>onload=()=>'
        "{const d=document.getElementById('f').contentDocument.documentElement;"
        "document.title=[d.scrollWidth,d.clientWidth,d.querySelectorAll('section').length].join(' ')}</script>"
    )
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    local = ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    page = (tmp_path / "frame.html").as_uri()
    done = subprocess.run([browser, *quiet, *local, "--dump-dom", page], capture_output=True, text=True, timeout=120)
    told = re.search(r"<title>(\d+) (\d+) (\d+)</title>", done.stdout)
    assert told, done.stdout[:500] + done.stderr[-500:]
    scroll, client, sections = map(int, told.groups())
    assert scroll <= client
    assert sections > 0
