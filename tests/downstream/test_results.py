"""Results as files: CLIP_benchmark's readers take them, and ours take CLIP_benchmark's."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from downstream.results import Result, pictures_path, read, read_pictures, slug, write
from pretrain.errors import UserError


def result(**changes) -> Result:
    given = {
        "dataset": "wds/flickr 8k",
        "model": "vit_base",
        "pretrained": "run@step_00000010",
        "task": "zeroshot_retrieval",
        "metrics": {"acc1": 0.5, "acc5": None},
        "intervals": {"acc1": [0.4, 0.6]},
        "chance": {"acc1": 0.1},
        "details": {"notes": ["one"]},
    }
    return Result(**(given | changes))


def clip_benchmark_build(folder: Path, output: Path) -> list[dict[str, str]]:
    """What CLIP_benchmark's `build` does with a folder (its cli.py: main_build), line for line."""
    rows, fieldnames = [], set()
    for path in sorted(folder.iterdir()):
        if not path.name.endswith(".json"):
            continue
        data = json.loads(path.read_text())
        row = {}
        row.update(data["metrics"])
        row.update(data)
        del row["metrics"]
        row["model_fullname"] = row["model"] + " " + row["pretrained"]
        fieldnames |= set(row)
        rows.append(row)
    with output.open("w") as file:
        writer = csv.DictWriter(file, sorted(fieldnames))
        writer.writeheader()
        writer.writerows(rows)
    return list(csv.DictReader(output.open()))


def test_clip_benchmark_builds_its_table_from_our_folder(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    write(result(), folder, {"chosen": "at random"})
    write(result(pretrained="untrained", metrics={"acc1": 0.25}), folder)
    rows = clip_benchmark_build(folder, tmp_path / "all.csv")
    assert [r["acc1"] for r in rows] == ["0.5", "0.25"]
    assert {r["task"] for r in rows} == {"zeroshot_retrieval"}
    assert {r["language"] for r in rows} == {"en"}
    assert {r["model_fullname"] for r in rows} == {"vit_base run@step_00000010", "vit_base untrained"}


def test_a_result_and_its_pictures_come_back_as_written(tmp_path: Path) -> None:
    path = write(result(), tmp_path, {"map": {"points": [[0.5, float("nan"), 1]]}})
    assert read(path) == result()
    assert read_pictures(path) == {"map": {"points": [[0.5, None, 1]]}}
    assert pictures_path(path).parent.name == "pictures"
    assert not list(tmp_path.rglob("*.part*"))


def test_trained_untrained_and_other_data_never_share_a_file() -> None:
    names = {
        result(**change).stem for change in ({}, {"pretrained": "untrained"}, {"dataset": "coco"}, {"task": "knn"})
    }
    assert len(names) == 4
    assert all("/" not in name and " " not in name for name in names)
    assert slug("../../etc") == "etc"


def test_undefined_figures_are_null_not_nan(tmp_path: Path) -> None:
    path = write(result(metrics={"acc5": float("nan")}), tmp_path)
    assert "NaN" not in path.read_text()
    assert read(path).metrics == {"acc5": None}


def test_a_result_of_clip_benchmark_itself_is_read(tmp_path: Path) -> None:
    theirs = {
        "dataset": "cifar10",
        "model": "ViT-B-32",
        "pretrained": "openai",
        "task": "zeroshot_classification",
        "metrics": {"acc1": 0.89, "acc5": float("nan"), "mean_average_precision": [1, 2]},
        "language": "en",
    }
    (tmp_path / "x.json").write_text(json.dumps(theirs))
    found = read(tmp_path / "x.json")
    assert found.metrics == {"acc1": 0.89, "acc5": None, "mean_average_precision": None}
    assert found.intervals == {}
    odd = theirs | {
        "model": 7,
        "intervals": ["acc1"],
        "chance": {"acc1": "x"},
        "details": None,
        "language": None,
    }
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    assert read(tmp_path / "odd.json").model == "7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable JSON"),
        ("[]", "not an evaluation result"),
        ('{"dataset": "a", "task": "b"}', "lacks model, pretrained, metrics"),
        ('{"dataset":1,"model":1,"pretrained":1,"task":1,"metrics":[]}', "table of metrics"),
    ],
)
def test_what_is_no_result_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "bad.json")
    assert "bad.json" in str(error.value)
