"""What is found wrong with a machine, a site's configuration and what ranks of a short job told."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest

from pretrain import cli_doctor
from pretrain.__main__ import main as pretrain
from pretrain.cli_doctor import version
from slurm import doctor, probe, site
from slurm.__main__ import main
from slurm.profile import Profile
from slurm.work import Resources

# scontrol show config, of it what is looked at, and scontrol --oneliner show partition: captured from Slurm 22.05.8
CONFIG = """\
Configuration data as of 2026-11-25T08:04:57
AccountingStorageEnforce = none
AccountingStorageType   = accounting_storage/slurmdbd
JobRequeue              = 1
KillWait                = 3 sec
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
SlurmctldParameters     = preempt_send_user_signal
SLURM_VERSION           = 22.05.8
TrackWCKey              = No
"""
PARTITIONS = (
    "PartitionName=main AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A "
    "DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=20 Hidden=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED "
    "MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=n[1-3] PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO "
    "OverSubscribe=NO OverTimeLimit=NONE PreemptMode=REQUEUE State=UP TotalCPUs=12 TotalNodes=3\n"
    "PartitionName=high AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=NO QoS=N/A "
    "DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO MaxNodes=2 MaxTime=1-00:00:00 "
    "MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=n[1-3] PriorityJobFactor=1 PriorityTier=10 RootOnly=NO "
    "ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode=OFF State=UP TotalCPUs=12 TotalNodes=3\n"
)


def found(profile: Profile | None = None, nodes: int = 1, config: str = CONFIG, parts: str = PARTITIONS) -> list[str]:
    problems = site.problems(profile or Profile(), nodes, site.settings(config), site.partitions(parts))
    assert all(problem.why and problem.do for problem in problems)
    return [problem.what for problem in problems]


def test_a_site_that_is_well() -> None:
    assert found(nodes=3) == []
    facts = site.facts(site.settings(CONFIG), site.partitions(PARTITIONS)["main"])
    assert facts["partition"] == "main: 3 nodes, at most UNLIMITED, preempted by REQUEUE after 20 s"


def test_what_a_partition_does_not_give() -> None:
    assert found(Profile(partition="gpu")) == ["no partition gpu"]
    assert found(parts=PARTITIONS.replace("Default=YES", "Default=NO")) == ["no partition is the default"]
    assert found(nodes=4) == ["4 nodes are asked for, partition main gives at most 3"]
    assert found(Profile(partition="high", minutes=1441), nodes=3) == [
        "jobs ask for 1441 minutes, partition high allows 1-00:00:00",
        "3 nodes are asked for, partition high gives at most 2",
    ]
    assert found(Profile(partition="high", minutes=1440)) == []
    assert found(parts=PARTITIONS.replace("State=UP", "State=DRAIN")) == ["partition main is DRAIN"]


def test_how_a_partition_preempts() -> None:
    told = found(config=CONFIG.replace("preempt_send_user_signal", "(null)"))
    assert told == ["partition main preempts jobs with SIGTERM, 20 s before SIGKILL, and no signal before"]
    no_grace = PARTITIONS.replace("GraceTime=20", "GraceTime=0")
    (at_once,) = found(parts=no_grace)
    assert "3 s before SIGKILL" in at_once
    assert found(parts=no_grace, config=CONFIG.replace("3 sec", "60 sec")) == []
    cancels = PARTITIONS.replace("PreemptMode=REQUEUE", "PreemptMode=CANCEL")
    assert found(parts=cancels) == ["partition main cancels jobs that it preempts"]
    assert found(parts=cancels, config=CONFIG.replace("preempt/partition_prio", "preempt/none")) == []


def test_a_site_that_wants_a_wckey() -> None:
    config = CONFIG.replace("AccountingStorageEnforce = none", "AccountingStorageEnforce = associations,wckeys")
    (problem,) = site.problems(Profile(), 1, site.settings(config), site.partitions(PARTITIONS))
    assert problem.what == "this site accepts jobs with a wckey of its list only, and the profile has none"
    assert "your default key" in problem.why
    assert found(Profile(wckey="team"), config=config) == []


@pytest.mark.parametrize(("minutes", "signal_s", "well"), [(5, 300, False), (6, 300, False), (7, 300, True)])
def test_a_warning_that_comes_at_the_start(minutes: int, signal_s: int, well: bool) -> None:
    told = found(Profile(minutes=minutes, signal_s=signal_s))
    assert told == [] if well else f"ask for {minutes} minutes, and are warned {signal_s} s before" in told[0]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("30", 30), ("90:30", 90.5), ("2:00:00", 120), ("1-00:00:00", 1440), ("2-12", 3600), ("UNLIMITED", float("inf"))],
)
def test_times_as_slurm_writes_them(text: str, minutes: float) -> None:
    assert site.minutes(text) == minutes


# ---------------------------------------------------------------- what ranks told


def report(rank: int, **changes: Any) -> dict[str, Any]:
    """Of a rank where all is well."""
    return {
        "rank": rank, "host": f"n{rank + 1}", "python": platform.python_version(), "code": "/code",
        **{name: version(name) for name in probe.PACKAGES}, "cores": 4, "gpus": 0, "scontrol": True, "online": True,
        "offline": False, "problems": [], "met": True, "clock": 1e9 + rank / 1000, "seen": 2,
        "locked": True if rank else None,
    } | changes  # fmt: skip


def judged(*changes: dict[str, Any], offline: bool = False, gpus: int = 0) -> list[str]:
    reports = [report(rank, **change) for rank, change in enumerate(changes)]
    problems = doctor.judge(reports, Resources(nodes=2, gpus_per_node=gpus), offline)
    assert all(problem.why and problem.do for problem in problems)
    return [problem.what for problem in problems]


def test_nodes_that_are_well() -> None:
    assert judged({}, {}) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"scontrol": False}, "no scontrol that answers on n2"),
        ({"torch": "1.0"}, f"torch is 1.0 on n2, {version('torch')} here"),
        ({"python": "3.9.1"}, f"python is 3.9.1 on n2, {platform.python_version()} here"),
        ({"online": False}, "no way to the internet from n2"),
        ({"cores": 1}, "fewer than 4 cores for a rank on n2"),
        ({"seen": 1}, "files of all nodes are not seen on n2"),
        ({"locked": False}, "a lock (flock) of one node does not hold on n2"),
        ({"clock": 1e9 + 7}, "clocks of the nodes differ by 7.0 s"),
        ({"nccl": "unhandled system error"}, "NCCL fails on n2: unhandled system error"),
        ({"failed": "DistNetworkError: timed out"}, "ranks do not meet: rank 1 on n2: DistNetworkError: timed out"),
        ({"problems": [{"what": "no faiss", "why": "x", "do": "y"}]}, "n2: no faiss"),
    ],
)
def test_one_node_that_is_not(change: dict[str, Any], what: str) -> None:
    assert judged({}, change) == [what]


def test_a_rank_that_tells_nothing_and_gpus_that_are_not_seen() -> None:
    assert judged({"seen": 2}) == ["ranks 1 told nothing"]
    assert judged({}, {}, gpus=2) == ["2 GPUs a node are asked for, torch sees 0 on n1, n2"]
    assert judged({"online": False}, {"online": False}, offline=True) == []
    assert judged({"online": False, "offline": True}, {}) == []


def test_reports_are_found_among_other_output() -> None:
    lines = [f"{probe.HEADER}{json.dumps({'rank': rank})}" for rank in (1, 0)]
    assert [r["rank"] for r in doctor.reports("\n".join(["Loading cuda", *lines, ""]))] == [0, 1]


def test_the_probe_asks_for_what_training_would() -> None:
    profile = Profile(
        partition="long", mem="0", setup=("module load cuda",), interface="ib0", offline=True, srun=("--mpi=none",)
    )
    argv = doctor.command(profile, Resources(nodes=3, ranks_per_node=2, gpus_per_node=2, cpus_per_rank=7), Path("/w/x"))
    asked = {
        "--nodes=3",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        "--cpus-per-task=7",
        "--partition=long",
        "--mem=0",
    }
    assert asked | {"--mpi=none"} <= set(argv)
    first, *lines = argv[-1].splitlines()
    assert first == "module load cuda"
    assert {"export NCCL_SOCKET_IFNAME=ib0", "export HF_HUB_OFFLINE=1"} <= set(lines)
    assert re.search(r"python\S* -m slurm\.probe /w/x$", lines[-1])


# ---------------------------------------------------------------- the doors


def test_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    codes = [pretrain(["doctor", "--json"]), main(["doctor", "--json"])]
    here, there = capsys.readouterr().out.split("\n}\n")[:2]
    assert json.loads(here + "}") == json.loads(there + "}")
    told = json.loads(here + "}")
    assert told["facts"]["slurm"] == "not on this machine"
    assert codes == [bool(told["problems"])] * 2
    assert main(["doctor", "--nodes", "2"]) == 2
    assert "no sbatch on this machine" in capsys.readouterr().err


def test_a_problem_says_what_why_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_doctor, "LEAST_GIB", 10**9)
    monkeypatch.setattr(cli_doctor, "LEAST_INODES", 10**18)
    monkeypatch.chdir(tmp_path)
    assert pretrain(["doctor"]) == 1
    said = capsys.readouterr().out
    assert f"GiB are free in {tmp_path}\n  why: checkpoints may not fit\n  do:  make room" in said
    assert f"more files are possible in {tmp_path}" in said


def test_a_controller_that_does_not_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in doctor.COMMANDS:
        (tmp_path / name).write_text("#!/bin/sh\necho 'slurm_load_ctl_conf error: Unable to contact' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert main(["doctor", "--nodes", "2"]) == 1
    said = capsys.readouterr()
    assert "PROBLEM: the controller does not answer: scontrol ping: slurm_load_ctl_conf error" in said.out
    assert "waiting for its turn" not in said.err
    (tmp_path / "sacct").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["doctor"]) == 1
    assert "PROBLEM: no sacct on this machine" in capsys.readouterr().out
