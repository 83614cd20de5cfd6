"""A recipe as a job: what sbatch is told, what a site's profile adds, and the same job run here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.__main__ import main as train
from pretrain.recipe import load_recipe
from pretrain.telemetry.runlog import read_log
from slurm import records
from slurm.__main__ import main
from slurm.profile import Profile
from slurm.submit import submit as send
from slurm.submit import training
from slurm.wait import outcome
from slurm.work import Resources
from tests.tiny import recipe_data, write_recipe, write_shards


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    shards = write_shards(tmp_path / "shards", samples=24)
    return write_recipe(tmp_path / "r.yaml", recipe_data(shards, tmp_path / "run", steps=2))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that keeps the script it is given and answers as Slurm does; an empty queue."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name in ("sbatch", "srun"):
        (bin_ / name).write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/sent.sh\necho "Submitted batch job 42"\n')
    (bin_ / "squeue").write_text(f"#!/bin/sh\ncat {tmp_path}/queue\n")
    for file in bin_.iterdir():
        file.chmod(0o755)
    (tmp_path / "queue").touch()
    monkeypatch.setenv("PATH", f"{bin_}:/usr/bin:/bin")
    return tmp_path


def submit(*argv: object) -> int:
    return main(["submit", *map(str, argv)])


def flags(text: str) -> set[str]:
    return {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}


def command(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    return line


ASKED = ["--nodes", 2, "--ranks-per-node", 3, "--gpus-per-node", 3, "--cpus-per-rank", 5, "--minutes", 90]


def test_sbatch_is_told_what_was_asked(recipe: Path, cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(recipe, "steps=7", *ASKED, "--partition", "long", "--account", "us", "--after", "41") == 0
    assert "job 42: tiny on 2 x 3 ranks" in capsys.readouterr().out
    sent, run = (cluster / "sent.sh").read_text(), cluster / "run"
    asked = {"nodes=2", "ntasks-per-node=3", "gpus-per-node=3", "cpus-per-task=5", "time=90", "job-name=tiny"}
    assert asked | {"partition=long", "account=us", "requeue", "signal=USR2@120", "open-mode=append"} <= flags(sent)
    assert {"dependency=afterok:41", "kill-on-invalid-dep=yes", f"comment=polyview:{run}"} <= flags(sent)
    assert "--cpus-per-task=5 --kill-on-bad-exit=1" in command(sent)
    assert "steps: 7" in next((run / "slurm").glob("recipe-*.yaml")).read_text()
    (line,) = records.submissions(run / "slurm")
    assert (line["job"], line["nodes"], line["ranks_per_node"]) == ("42", 2, 3)


def test_a_dry_run_shows_that_very_script_and_leaves_nothing(
    recipe: Path, cluster: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as nowhere:
        nowhere.setenv("PATH", "/nonexistent")
        assert submit(recipe, *ASKED, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert not (cluster / "run").exists()
    assert submit(recipe, *ASKED) == 0
    assert shown.strip() == (cluster / "sent.sh").read_text().strip()


def test_a_profile_says_what_the_site_wants(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site.yaml").write_text(
        "partition: gpu\nqos: long\nconstraint: a100\nreservation: us\nexclude: n9\nmem: 480G\nminutes: 1440\n"
        "gpus_per_node: 2\nsetup: [module load cuda]\nnetwork: infiniband\ninterface: ib0\noffline: true\n"
        "env: {MINE: a b}\nsbatch: {mail-type: END}\nwckey: team\nsignal_s: 300\n"
    )
    monkeypatch.setenv("POLYVIEW_PROFILE", str(tmp_path / "site.yaml"))
    assert submit(recipe, "--partition", "debug", "--exclude", "n7", "--dry-run") == 0
    text = capsys.readouterr().out
    told = {
        "partition=debug",
        "qos=long",
        "constraint=a100",
        "reservation=us",
        "exclude=n9,n7",
        "mem=480G",
        "time=1440",
    }
    assert told | {"gpus-per-node=2", "ntasks-per-node=2", "mail-type=END", "wckey=team"} <= flags(text)
    lines = text.splitlines()
    assert lines.index("module load cuda") < lines.index("export MINE='a b'")
    assert {"export NCCL_SOCKET_IFNAME=ib0", "export HF_HUB_OFFLINE=1", "export NCCL_IB_DISABLE=0"} <= set(lines)


@pytest.mark.parametrize(
    ("container", "starts"),
    [
        ("{kind: apptainer, image: p.sif, options: [--nv]}", "apptainer exec --nv --pwd="),
        ("{kind: pyxis, image: polyview.sqsh}", "--container-image=polyview.sqsh"),
    ],
)
def test_containers(
    recipe: Path, tmp_path: Path, container: str, starts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "box.yaml").write_text(f"container: {container[:-1]}, binds: [/data]}}\n")
    assert submit(recipe, "--profile", tmp_path / "box.yaml", "--dry-run") == 0
    line = command(capsys.readouterr().out)
    assert starts in line
    run = tmp_path / "run"
    assert re.search(rf"{run}:{run}[ ,]", line)  # all of the run is seen inside, checkpoints too
    assert line.endswith(f"python -u -m submitit.core._submit {tmp_path / 'run' / 'slurm'}")


def test_what_a_profile_gets_wrong_is_named(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "site.yaml").write_text("partitions: gpu\n")
    assert submit(recipe, "--profile", tmp_path / "site.yaml", "--dry-run") == 2
    assert "unknown key partitions; did you mean partition?" in capsys.readouterr().err
    assert submit(recipe, "--profile", "gpu-infinband", "--dry-run") == 2
    assert "did you mean gpu-infiniband?" in capsys.readouterr().err


def test_more_nodes_where_they_are_free(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(recipe, "--nodes", "2-3", "--dry-run") == 0
    assert "nodes=2-3" in flags(capsys.readouterr().out)
    assert submit(recipe, "--nodes", "4-5", "--dry-run") == 2  # 12 into 5
    assert "world 5" in capsys.readouterr().err


def test_the_same_job_runs_here_on_two_ranks(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["local", str(recipe), "--ranks-per-node", "2"]) == 0
    run = recipe.parent / "run"
    assert [line["step"] for line in read_log(run / "log.jsonl")] == [1, 2]
    assert str(run / "slurm") in capsys.readouterr().out
    (attempt,) = records.attempts(run / "slurm")
    assert (attempt.how, attempt.restart) == ("done", 0)


def test_later_edits_do_not_reach_a_job(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in goes with the job: neither its later form nor what lies in the working folder is looked at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "my_objective"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "clip.py").write_text("from pretrain.objectives.clip import OBJECTIVE\n")
    work = training(load_recipe(recipe, ["objectives={my_objective.clip: 1.0}"]), Resources(), Profile())
    (package / "clip.py").write_text("raise RuntimeError('edited')\n")
    (tmp_path / "pretrain.py").write_text("raise RuntimeError('not polyview')\n")
    assert outcome(work, send(work, "local"), "local") == 0
    log = next((tmp_path / "run" / "slurm").glob("*_log.err")).read_text()
    assert "step 2/2" in log


def test_a_job_that_fails_says_so(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(recipe, "data.sources.0.shards=/nowhere", "--local", "--wait") == 2
    said = Path(capsys.readouterr().err.split("see ")[1].strip())
    (log,) = said.parent.glob(said.name)
    assert "no shard /nowhere" in log.read_text()
    (attempt,) = records.attempts(said.parent)
    assert attempt.how == "failed: exit code 2"


def test_one_job_a_run(recipe: Path, cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster / "queue").write_text(f"41|PENDING|Priority|1||0:00|1:00:00|N/A|tiny|polyview:{cluster / 'run'}\n")
    assert submit(recipe) == 2
    assert "job 41 of" in capsys.readouterr().err
    assert not (cluster / "sent.sh").exists()


def test_another_recipe_in_the_same_folder_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["train", str(recipe)]) == 0
    assert submit(recipe, "seed=5", "--local") == 2
    assert "seed: 0 -> 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["world=3", "--ranks-per-node", "1"], "needs world 3; --nodes x --ranks-per-node is 1"),
        (["--ranks-per-node", "5"], "12"),
        (["--ranks-per-node", "0"], "no rank at all"),
        (["--nodes", "two"], "--nodes two: give a number"),
        (["--minutes", "2"], "no time is left to train"),
        (["--local", "--nodes", "2"], "--nodes 1 --ranks-per-node 2"),
        ([], "no sbatch and no srun on this machine"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_sent(
    recipe: Path, argv: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert submit(recipe, *argv) == 2
    assert says in capsys.readouterr().err
    assert not (recipe.parent / "run" / "checkpoints").exists()


def test_help_is_there_at_once() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "slurm", "submit", "--help"], capture_output=True)
    assert b"--dry-run" in done.stdout
    assert b" torch\n" not in done.stderr
