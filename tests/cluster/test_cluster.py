"""The cluster that other tests stand on: its nodes, its faults, and what is left of it afterwards."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.network import Network, claim, find, remove_abandoned
from tests.cluster.process import Daemons, Process, spawn

pytestmark = pytest.mark.cluster

NODES = ["n1", "n2", "n3"]


def submit(cluster: Cluster, script: str, *options: str) -> str:
    """The id of a job that runs `script`, a line of shell."""
    return cluster.run("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}").strip()


def lines(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


def accounted(cluster: Cluster, job_id: str) -> list[str]:
    """State and nodes of a job, as accounting has them; it lags by some seconds."""
    return cluster.run("sacct", "--noheader", "--allocations", f"--jobs={job_id}", "--format=State,NodeList").split()


def test_every_node_is_a_machine_of_its_own(slurm: Cluster) -> None:
    assert sorted(slurm.run("srun", "-N3", "hostname").split()) == NODES
    slurm.run("srun", "-N3", "sh", "-c", "touch /dev/shm/$(hostname)")
    own = "echo $(hostname) $(ip -4 -o addr show eth0 | awk '{print $4}') $(ls /dev/shm) $(pgrep -cx slurmd)"
    network = find(slurm.folder)
    assert network is not None
    told = sorted(slurm.run("srun", "-N3", "sh", "-c", own).splitlines())
    assert told == [f"n{i} {network.address(i)}/24 n{i} 1" for i in (1, 2, 3)]


def test_nodes_reach_each_other_by_name(slurm: Cluster) -> None:
    listen = "import socket; s = socket.create_server(('n2', 5000)); print(s.accept()[0].recv(9).decode())"
    call = (
        "import socket, time\n"
        "for _ in range(100):\n"
        "  try: socket.create_connection(('n2', 5000)).send(b'hello'); break\n"
        "  except OSError: time.sleep(0.1)"
    )
    each = f'[ $(hostname) = n2 ] && exec {sys.executable} -c "{listen}" || exec {sys.executable} -c "{call}"'
    assert slurm.run("srun", "-w", "n1,n2", "sh", "-c", each) == "hello\n"


def test_a_batch_job_starts_a_step_on_all_its_nodes(slurm: Cluster, tmp_path: Path) -> None:
    submit(slurm, f"srun --label hostname > {tmp_path}/said", "-N3", "--ntasks-per-node=1", "--wait")
    assert sorted((tmp_path / "said").read_text().splitlines()) == ["0: n1", "1: n2", "2: n3"]


def test_gpus_are_given_out_by_number(slurm: Cluster) -> None:
    for gpus, numbers in ((1, "0"), (2, "0,1")):
        told = slurm.run("srun", "-N2", f"--gpus-per-node={gpus}", "printenv", "CUDA_VISIBLE_DEVICES").split()
        assert told == [numbers] * 2


def test_a_job_on_a_crashed_node_is_requeued_and_runs_again_when_it_is_back(slurm: Cluster, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    job = submit(slurm, f"hostname >> {starts}; sleep 600", "--nodelist=n3")
    slurm.wait_for(lambda: lines(starts), 30, "the job's start")
    slurm.crash("n3")
    slurm.wait_for(lambda: slurm.restarts(job) == 1, 60, "the job to be requeued")
    assert slurm.state(job) == "PENDING"  # it asks for that very node
    assert sorted(slurm.run("srun", "-N2", "hostname").split()) == ["n1", "n2"]  # they work on
    slurm.revive()
    slurm.wait_for(lambda: lines(starts) == ["n3", "n3"], 60, "the job's second start")
    assert slurm.state(job) == "RUNNING"


def test_a_job_is_warned_by_its_signal_and_makes_way_for_a_higher_partition(slurm: Cluster, tmp_path: Path) -> None:
    """The job requeues itself from its node when warned, as submitit's do."""
    log = tmp_path / "log"
    warned = f"trap 'echo warned >> {log}; scontrol requeue $SLURM_JOB_ID' USR2; echo start >> {log}; "
    job = submit(slurm, f"{warned} while :; do sleep 0.1; done", "-N3", "--exclusive", "--signal=B:USR2@60")
    slurm.wait_for(lambda: lines(log), 30, "the job's start")
    assert sorted(slurm.run("srun", "--partition=high", "-N3", "hostname").split()) == NODES
    slurm.wait_for(lambda: lines(log) == ["start", "warned", "start"], 60, "the job's second start")
    assert slurm.restarts(job) == 1


def test_daemons_and_nodes_out_of_service_are_revived(slurm: Cluster) -> None:
    slurm.run("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    slurm.stop_controller()  # it keeps what it was told: one that is killed outright forgets its last seconds
    for name in ("munged", "slurmdbd", "mariadbd"):
        daemon = Process.read(slurm.folder / f"run/{name}.pid")
        assert daemon is not None
        daemon.end()
    slurm.revive()
    assert sorted(slurm.run("srun", "-N3", "hostname").split()) == NODES


def test_accounting_keeps_jobs_that_ended_while_it_was_away(slurm: Cluster) -> None:
    slurm.stop_database()
    job = submit(slurm, "true", "--nodelist=n2", "--wait")
    slurm.start_database()
    slurm.wait_for(lambda: accounted(slurm, job) == ["COMPLETED", "n2"], 60, "accounting of the job")


def test_jobs_outlive_the_controller(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, f"while [ ! -e {tmp_path}/go ]; do sleep 0.1; done; echo done > {tmp_path}/done")
    slurm.wait_for(lambda: slurm.state(job) == "RUNNING", 30, "the job's start")
    slurm.stop_controller()
    with pytest.raises(RuntimeError, match="ended with"):
        slurm.jobs()
    (tmp_path / "go").touch()
    slurm.wait_for((tmp_path / "done").exists, 30, "the job's end")
    slurm.start_controller()
    slurm.wait_for(lambda: slurm.state(job) == "COMPLETED", 60, "the controller to hear of it")
    assert slurm.restarts(job) == 0


def test_clusters_side_by_side_and_what_is_left_of_one(cluster: Cluster, tmp_path: Path) -> None:
    """The other one's session is killed outright; the next one in its folder runs all the same, and tidies up."""
    folder = tmp_path / "other"
    up = f"from tests.cluster.cluster import *; Cluster(Path('{folder}'), nodes=1).up(); print('up', flush=True)"
    session = subprocess.Popen(
        [sys.executable, "-c", f"{up}; import time; time.sleep(600)"], stdout=subprocess.PIPE, text=True
    )
    assert session.stdout is not None
    assert session.stdout.readline() == "up\n"
    other = Cluster(folder, nodes=1)
    assert other.run("srun", "hostname") == "n1\n"
    assert sorted(cluster.run("srun", "-N3", "hostname").split()) == NODES
    network = find(folder)
    assert network not in (None, find(cluster.folder))
    assert len(processes_of(folder)) >= 5  # munged, mariadbd, slurmdbd, slurmctld, slurmd
    session.kill()
    session.communicate()
    cluster.wait_for(lambda: not processes_of(folder), 30, "the daemons to go with the session that started them")
    with other:
        assert other.run("srun", "hostname") == "n1\n"
        job = submit(other, "sleep 600")
        other.wait_for(lambda: other.state(job) == "RUNNING", 30, "the job's start")
    cluster.wait_for(lambda: not processes_of(folder), 10, "the last process to be gone")
    assert find(folder) is None
    assert network is not None
    links = "".join(path.name + "\n" for path in Path("/sys/class/net").iterdir())
    assert f"{network.bridge}\n" not in links
    assert f"pv{network.number}n" not in links
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()
    assert sorted(cluster.run("srun", "-N3", "hostname").split()) == NODES


def processes_of(folder: Path) -> list[str]:
    """Command lines that name a folder, on all its nodes too, and processes that have a file open in it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            opened = [os.readlink(fd) for fd in (process / "fd").iterdir()]
        except OSError:  # it is gone
            continue
        if process.name != str(os.getpid()) and any(str(folder) in text for text in (command, *opened)):
            found.append(command)
    return found


def test_networks_are_free_ones_and_those_of_dead_clusters_are_removed(cluster: Cluster, tmp_path: Path) -> None:
    first = claim(tmp_path / "first")
    with socket.create_server(("", Network(first.number + 1).ports[-1])):
        second = claim(tmp_path / "second")
    assert second.number > first.number + 1
    remove_abandoned(lambda folder: folder == tmp_path / "first")
    assert (find(tmp_path / "first"), find(tmp_path / "second")) == (None, second)
    remove_abandoned(lambda folder: folder in (tmp_path / "second", cluster.folder))
    assert find(tmp_path / "second") is None
    assert find(cluster.folder)  # nodes hang on it


def test_a_stranger_with_the_pid_of_a_daemon_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    stranger = spawn(["sleep", "600"], tmp_path / "log", os.environ, bound=True)
    daemons = Daemons(tmp_path, bound=True)
    daemons.keep("munged", Process(stranger.pid, stranger.started - 1))
    assert not daemons.running("munged")
    daemons.end_all()
    assert stranger.running()
    daemons.keep("munged", stranger)
    daemons.end_all()
    assert not stranger.running()
