"""A pipeline: its stages, the jobs that Slurm is told of, and what the same command does again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path

import pytest
import submitit

from pretrain.errors import UserError
from pretrain.recipe import Recipe, load_recipe
from pretrain.run import RunFolder
from slurm import dispatch, ledger, records
from slurm.__main__ import main
from slurm.here import run_here
from slurm.marks import Marks, trained
from slurm.pipeline import Pipeline
from slurm.profile import Profile
from slurm.stages import Asked, Stage, stages
from slurm.work import Resources, Work, send
from tests.slurm.queues import FakeSlurm
from tests.tiny import VIT, add, recipe_data, write_recipe, write_shards

ALL = ["train", "embed", "build", "publish", "retrieval", "knn", "zeroshot", "report"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with r.yaml, of two steps into run/, and shards/ of two tars."""
    shards = write_shards(tmp_path / "shards", samples=24, shards=2)
    write_recipe(tmp_path / "r.yaml", recipe_data(shards, tmp_path / "run", steps=2))
    return tmp_path


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("PATH", fake.path)
    return fake


def pipeline(place: Path, *argv: object) -> int:
    shards = place / "shards"
    given = ("--shards", shards, "--train", shards, "--out", place / "pipe", *argv)
    return main(["pipeline", str(place / "r.yaml"), *map(str, given)])


def sent(place: Path, slurm: FakeSlurm) -> dict[str, str]:
    """Script of each stage's newest job."""
    named = {re.search(r"job-name=(\S+)", script)[1].removeprefix("tiny-"): script for script in slurm.sent()}  # type: ignore[index]
    return {("train" if name == "tiny" else name): script for name, script in named.items()}


def dependency(script: str) -> list[str]:
    found = re.search(r"--dependency=afterok:(\S+)", script)
    return found[1].split(":") if found else []


def stages_of(place: Path, **changes: object) -> list[Stage]:
    given = {"shards": str(place / "shards"), "train": str(place / "shards")} | changes
    return stages(load_recipe(place / "r.yaml"), Asked(place / "pipe", **given))  # type: ignore[arg-type]


def end_training(place: Path, steps: int = 2) -> Recipe:
    """What a run of so many steps leaves for those who ask whether it is done."""
    recipe = load_recipe(place / "r.yaml", [f"steps={steps}"])
    run = RunFolder(recipe.output)
    run.claim(recipe)
    run.begin(recipe, {})
    with run.log_file.open("a") as log:
        log.write(json.dumps({"event": "save", "step": steps}) + "\n")
    run.ended("done")
    return recipe


def end(place: Path, name: str, *parts: int) -> None:
    """What the job of a stage leaves as its last act."""
    found = {stage.name: stage for stage in stages_of(place)}
    stage, marks = found[name], Marks(place / "pipe/stages", place / "run")
    on = marks.stamps([found[need] for need in stage.needs])
    made = Path(stage.makes.replace("{trained}", str(on.get("train"))).replace("*", "1"))
    made.parent.mkdir(parents=True, exist_ok=True)
    made.touch()
    for part in parts or (0,):
        marks.write(stage, part, on, "1")


# ---------------------------------------------------------------- what it is made of


def test_every_stage_comes_behind_what_it_needs(place: Path) -> None:
    found = stages_of(place)
    names = [stage.name for stage in found]
    assert names == ALL
    assert all(names.index(need) < i for i, stage in enumerate(found) for need in stage.needs)


def test_an_array_has_no_more_elements_than_tars(place: Path) -> None:
    assert [stage.parts for stage in stages_of(place, parts=12)] == [1, 2, *[1] * 6]


def test_an_encoder_without_text_is_asked_only_what_it_can(place: Path) -> None:
    image_only = recipe_data(place / "shards", place / "run", model=VIT | {"text": None}, objectives={"swav": 1.0})
    write_recipe(place / "r.yaml", image_only)
    assert [s.name for s in stages_of(place)] == ["train", "embed", "build", "publish", "knn", "report"]
    with pytest.raises(UserError, match="--tasks retrieval needs a text tower"):
        stages_of(place, tasks=["retrieval"])


def stripped(shards: Path, *parts: str) -> None:
    """Take members of these extensions out of all tars of `shards`."""
    for tar in shards.glob("*.tar"):
        with tarfile.open(tar) as whole:
            kept = [(m, whole.extractfile(m)) for m in whole if m.name.rpartition(".")[2] not in parts]
            with tarfile.open(tar.with_suffix(".new"), "w") as less:
                for member, file in kept:
                    less.addfile(member, file)
        tar.with_suffix(".new").replace(tar)


def test_only_what_the_data_can_be_judged_by_is_asked(place: Path) -> None:
    def tasks(**changes: object) -> list[str]:
        return [stage.name for stage in stages_of(place, **changes) if stage.room == "encoder"][1:]

    assert tasks() == ["retrieval", "knn", "zeroshot"]
    (place / "shards/classnames.txt").rename(place / "classnames.txt")  # in the folder above, as of a split
    assert tasks() == ["retrieval", "knn", "zeroshot"]
    (place / "classnames.txt").unlink()
    assert tasks() == ["retrieval", "knn"]
    (place / "shards/classnames.txt").write_text("zero\none\ntwo\n")
    write_shards(place / "unlabelled", samples=6, shards=1)
    stripped(place / "unlabelled", "cls")
    assert tasks(train=str(place / "unlabelled")) == ["retrieval", "zeroshot"]
    stripped(place / "shards", "cls")
    assert tasks() == ["retrieval"]
    assert tasks(tasks=["zeroshot"]) == ["zeroshot"]  # who asks for it knows better
    stripped(place / "shards", "txt")
    assert tasks() == []
    assert "--results" not in stages_of(place)[-1].argv


def test_a_first_tar_without_samples_and_classes_that_are_none(place: Path) -> None:
    with tarfile.open(place / "shards/-1.tar", "w"):
        pass
    assert [stage.name for stage in stages_of(place)] == ALL
    (place / "none").mkdir()
    with tarfile.open(place / "none/0.tar", "w") as tar:
        add(tar, "a.txt", b"a thing")
        add(tar, "a.cls", b"-1\n")
    (place / "none/classnames.txt").write_text("zero\n")
    assert [stage.name for stage in stages_of(place, shards=str(place / "none"))] == [
        "train",
        "embed",
        "build",
        "publish",
        "retrieval",
        "report",
    ]


def test_knn_needs_images_that_vote(place: Path) -> None:
    recipe, asked = load_recipe(place / "r.yaml"), Asked(place / "pipe", str(place / "shards"), tasks=["knn"])
    with pytest.raises(UserError, match="--tasks knn needs --train SHARDS"):
        stages(recipe, asked)


def test_shards_that_are_not_there_are_refused_at_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline(place, "--train", "/nowhere", "--dry-run") == 2
    assert "/nowhere" in capsys.readouterr().err


def test_a_dry_run_shows_every_script_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = ["--gpus-per-node", 2, "--minutes", 90, "--partition", "big"]
    others = ["--embed-minutes", 5, "--embed-partition", "s", "--parallel", 1]
    assert pipeline(place, *training, *others, "--dry-run") == 0
    shown = dict(re.findall(r"# ---- (\w+): polyview [^\n]*\n(.*?)(?=# ----|\Z)", capsys.readouterr().out, re.S))
    assert list(shown) == ALL
    assert dependency(shown["train"]) == []
    assert dependency(shown["build"]) == ["JOB_OF_train", "JOB_OF_embed"]
    assert dependency(shown["report"]) == [f"JOB_OF_{need}" for need in ("train", "retrieval", "knn", "zeroshot")]
    assert all("--kill-on-invalid-dep=yes" in shown[stage] for stage in ALL[1:])
    assert "--array=0-1%1" in shown["embed"]
    assert ["--gpus-per-node=2" in shown["train"], "--gpus-per-node=1" in shown["knn"]] == [True, True]
    assert "gpus" not in shown["build"]
    assert ["--time=90" in shown["train"], "--time=5\n" in shown["embed"]] == [True, True]
    assert ["partition=big" in shown["train"], "partition=s\n" in shown["report"]] == [True, True]
    assert not (place / "pipe").exists()
    assert not (place / "run").exists()


# ---------------------------------------------------------------- what is done


def test_training_is_done_when_it_ended_and_no_more_is_asked(place: Path) -> None:
    recipe = end_training(place)
    assert trained(recipe)
    assert not trained(recipe.model_copy(update={"steps": 3}))
    RunFolder(recipe.output).begin(recipe, {})  # goes on, and is killed
    assert not trained(recipe)


def test_what_stood_on_something_else_is_done_again(place: Path) -> None:
    end_training(place)
    for name in ("embed", "build", "publish"):
        end(place, name, *range(2 if name == "embed" else 1))
    marks, found = Marks(place / "pipe/stages", place / "run"), {s.name: s for s in stages_of(place)}

    def left(name: str) -> list[int]:
        return marks.left(found[name], [found[need] for need in found[name].needs])

    assert [left(name) for name in ("embed", "build", "publish")] == [[], [], []]
    end(place, "build")  # once more: publish stood on the build before
    assert [left("build"), left("publish")] == [[], [0]]
    end_training(place, steps=4)  # other weights
    assert [left("embed"), left("build")] == [[0, 1], [0]]


def test_new_tars_are_embedded(place: Path) -> None:
    end_training(place)
    end(place, "embed", 0, 1)
    (before,) = [stage for stage in stages_of(place) if stage.name == "embed"]
    shutil.copy(place / "shards/00000.tar", place / "shards/00002.tar")
    (now,) = [stage for stage in stages_of(place) if stage.name == "embed"]
    marks, needs = Marks(place / "pipe/stages", place / "run"), stages_of(place)[:1]
    assert [marks.left(before, needs), marks.left(now, needs)] == [[], [0, 1, 2]]


# ---------------------------------------------------------------- what Slurm is told


def test_the_same_command_leaves_alone_what_waits(
    place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline(place) == 0
    jobs = {name: str(i + 1) for i, name in enumerate(ALL)}
    needs = {stage.name: [jobs[need] for need in stage.needs] for stage in stages_of(place)}
    assert {name: dependency(script) for name, script in sent(place, slurm).items()} == needs
    capsys.readouterr()
    assert pipeline(place, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {line["stage"]: line["jobs"] for line in told["stages"]} == {name: [job] for name, job in jobs.items()}
    assert len(slurm.sent()) == len(ALL)
    assert slurm.cancelled() == []


def test_only_the_elements_that_lack_are_sent_again(place: Path, slurm: FakeSlurm) -> None:
    assert pipeline(place) == 0  # train 1, embed 2, build 3, publish 4, …
    end_training(place)
    slurm.drop("1", "2_0")  # the first element failed
    slurm.run("2_1")
    assert pipeline(place) == 0
    again = slurm.sent()[len(ALL) :]
    assert len(again) == 3
    assert "--array" not in again[0]
    assert dependency(again[0]) == []
    assert dependency(again[1]) == ["2_1", "9"]  # build: the one that runs, and the one that was sent again
    assert dependency(again[2]) == ["10"]
    assert slurm.cancelled() == ["3", "4"]  # they waited for an array that will never be well
    assert pipeline(place) == 0
    end(place, "embed", 1)
    slurm.drop("2_1")
    assert pipeline(place) == 0
    assert len(slurm.sent()) == len(ALL) + 3
    assert slurm.cancelled() == ["3", "4"]


def test_elements_that_are_about_to_come_back_are_not_sent_again(
    place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    end_training(place)
    assert pipeline(place) == 0
    monkeypatch.setattr(ledger, "ENDING_S", 0)
    queue = place / "fake/queue"
    queue.write_text(queue.read_text().replace("1_1|PENDING", "1_1|COMPLETING"))  # its node is lost
    capsys.readouterr()
    assert pipeline(place) == 0
    assert "1 pending, 1 completing" in capsys.readouterr().out
    assert len(slurm.sent()) == len(ALL) - 1
    assert slurm.cancelled() == []


def test_waiting_goes_on_while_a_job_is_about_to_come_back(
    place: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_training(place)
    monkeypatch.setattr(ledger, "ENDING_S", 0)
    monkeypatch.setattr(dispatch, "POLL_S", 0.05)
    all_stages = stages_of(place)
    line = f"1_0|COMPLETING|None|1|n1|0:01|1:00:00|N/A|tiny-embed|polyview:{place / 'pipe'}\n"
    (place / "fake/queue").write_text(line)

    def come_back() -> None:
        time.sleep(0.5)
        for stage in all_stages[1:]:
            end(place, stage.name, *range(stage.parts))
        slurm.drop("1_0")

    back = threading.Thread(target=come_back)
    back.start()
    assert dispatch.wait_for(Pipeline(load_recipe(place / "r.yaml"), place / "pipe", all_stages, {}), print) == 0
    back.join()


def test_a_folder_by_another_name_is_the_same(place: Path, slurm: FakeSlurm) -> None:
    assert main(["submit", str(place / "r.yaml")]) == 0
    assert pipeline(place) == 0
    (place / "alias").symlink_to(".")
    argv = ["pipeline", place / "r.yaml", f"output={place}/alias/run", "--out", place / "alias/pipe"]
    assert main([*map(str, argv), "--shards", str(place / "shards"), "--train", str(place / "shards")]) == 0
    names = [re.search(r"job-name=(\S+)", script)[1] for script in slurm.sent()]  # type: ignore[index]
    assert names.count("tiny") == 1


def test_what_waits_for_ever_is_sent_again(place: Path, slurm: FakeSlurm) -> None:
    end_training(place)
    assert pipeline(place) == 0  # embed 1, build 2, publish 3, …
    for name in ("embed", "build"):
        end(place, name, *range(2 if name == "embed" else 1))
    slurm.drop("1_0", "1_1", "2")
    slurm.strand("3")
    assert pipeline(place) == 0
    assert slurm.cancelled() == ["3"]
    assert dependency(sent(place, slurm)["publish"]) == []
    assert len(slurm.sent()) == len(ALL)  # all but train, and publish once more


def test_a_stage_that_runs_with_other_arguments_is_not_started_beside(
    place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    end_training(place)
    assert pipeline(place) == 0
    slurm.run("1_0", "1_1")
    capsys.readouterr()
    shutil.move(place / "shards", place / "moved")
    assert pipeline(place, "--shards", place / "moved", "--train", place / "moved") == 2
    assert "stage embed runs as job 1_0 with other arguments" in capsys.readouterr().err
    shutil.move(place / "moved", place / "shards")
    assert pipeline(place, "--parts", 1) == 2  # shared otherwise
    assert "parts=2" in capsys.readouterr().err


def test_training_that_is_in_the_queue_by_another_command_is_waited_for(place: Path, slurm: FakeSlurm) -> None:
    assert main(["submit", str(place / "r.yaml")]) == 0
    assert pipeline(place) == 0
    assert dependency(sent(place, slurm)["embed"]) == ["1"]


# ---------------------------------------------------------------- on this machine


def test_two_commands_are_not_at_work_on_one_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Pipeline(load_recipe(place / "r.yaml"), place / "pipe", stages_of(place), {}).held():
        assert pipeline(place, "--local") == 2
    assert f"another command is at work on the pipeline in {place / 'pipe'}" in capsys.readouterr().err


def test_what_runs_here_ends_with_the_command(place: Path) -> None:
    rooms = {"files": (Resources(), Profile())}
    lines = Pipeline(load_recipe(place / "r.yaml"), place / "pipe", stages_of(place), rooms)  # type: ignore[arg-type]
    work = lines.work(lines.stages[2], [0])  # waits for the mark of a stage that has not run
    jobs: list[submitit.Job] = []

    def start(work: Work) -> submitit.Job:
        jobs.extend(send(work, "local"))
        return jobs[-1]

    def interrupt() -> None:
        while not (jobs and records.attempts(lines.folder)):
            time.sleep(0.05)
        time.sleep(0.5)  # what starts a job does not listen
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        list(run_here([work], start, 1))
    assert jobs[0].done()
    assert [attempt.how for attempt in records.attempts(lines.folder)] == ["failed: exit code 1"]
    assert not list(lines.marks.folder.glob("*.json"))


def test_the_way_to_the_report_goes_on_where_it_stopped(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "pipe/report.html").mkdir(parents=True)  # in the report's way
    local = ["--tasks", "retrieval", "--parallel", 2, "--local"]
    assert pipeline(place, *local) == 1
    said = capsys.readouterr()
    assert "report ended with exit code 1" in said.err
    assert "IsADirectoryError" in said.err
    (place / "pipe/report.html").rmdir()
    (place / "pipe/collection/CURRENT").unlink()
    assert pipeline(place, *local) == 0
    assert "<html" in (place / "pipe/report.html").read_text()
    jobs = [line["name"] for line in records.submissions(place / "pipe/slurm")]
    assert jobs == ["embed", "embed", "build", "publish", "retrieval", "report", "publish", "report"]
    assert len(RunFolder(place / "run").starts()) == 1
    capsys.readouterr()
    assert pipeline(place, *local, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {line["state"] for line in told["stages"]} == {"done"}
    assert len(records.submissions(place / "pipe/slurm")) == len(jobs)
