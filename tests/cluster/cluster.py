"""A real Slurm of several nodes on this one machine, for as long as a test session needs it.

munge, MariaDB, slurmdbd and slurmctld run on the machine itself, each slurmd on a node made of namespaces (`nodes.py`),
all from one folder: nothing of the machine's own Slurm, munge or MariaDB is read or touched, and any number of clusters
run beside each other. What it does not do: cgroups, users other than root, GPUs that compute (they are devices that
only have the name).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from pretrain.errors import UserError
from tests.cluster.config import Layout, files
from tests.cluster.database import Database
from tests.cluster.network import Network, claim, find, remove_abandoned
from tests.cluster.nodes import Nodes
from tests.cluster.process import PATH, Daemons, environment

SETTLE_S = 60
"""Seconds that daemons have to come up and nodes to come back; a quiet machine needs a few."""
READY = {"idle", "mixed", "allocated", "completing"}
_PROGRAMS = {
    "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "slurmdbd": "slurmdbd", "munged": "munge",
    "mariadbd": "mariadb-server", "ip": "iproute2", "unshare": "util-linux", "setpriv": "util-linux",
}  # fmt: skip
_SOCKET_PATH_MAX = 107


class Cluster:
    """Nodes n1, n2, … in partitions `main` (jobs are preempted and requeued) and `high` (preempts them)."""

    def __init__(self, folder: Path, nodes: int = 3, cpus: int = 4, gpus: int = 2, *, bound: bool = True) -> None:
        """
        Args:
            folder: all that it writes is there, and tells another process what runs.
            bound: it dies with the thread that called `up`, however that ends.
        """
        self.folder = folder.resolve()
        self._shape = {"nodes": nodes, "cpus": cpus, "gpus": gpus}
        self._daemons = Daemons(self.folder, bound=bound)

    def __enter__(self) -> Cluster:
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.down()

    # up and down

    def up(self) -> None:
        """Start what does not run; returns when all nodes take jobs.

        Raises:
            UserError: something is missing on this machine.
        """
        if told := missing():
            raise UserError(f"no Slurm cluster can be made here: {told}")
        if len(str(self.folder / "munge.sock")) > _SOCKET_PATH_MAX:
            raise UserError(f"{self.folder} is too long a path: sockets go there; choose a shorter one")
        self._make_folders()
        self._start_munge()
        remove_abandoned(lambda folder: not Daemons(folder, bound=False).running("munged"))
        self._configure(find(self.folder) or claim(self.folder))
        self.revive()

    def revive(self) -> None:
        """Bring back the nodes and daemons that died or were taken out of service; returns when all nodes take jobs."""
        self._start_munge()
        self.start_database()
        self.start_controller()
        self._nodes.start_missing()
        self.wait_for(self._nodes.listening, SETTLE_S, "slurmd on every node")
        self.wait_for(self._all_ready, SETTLE_S, "all nodes to be idle or at work")

    def down(self) -> None:
        """End all that `up` started, here or in another process, jobs included; what it wrote stays in the folder."""
        self._daemons.end_all()
        if network := find(self.folder):
            network.remove()

    # faults

    def crash(self, node: str) -> None:
        """Power loss of a node, until `revive`."""
        self._nodes.crash(node)

    def stop_controller(self) -> None:
        self._daemons.end("slurmctld", signal.SIGTERM)

    def start_controller(self) -> None:
        if not self._daemons.running("slurmctld"):
            self._daemons.start("slurmctld", "slurmctld", "-D", "-f", self.env["SLURM_CONF"])
        self.wait_for(lambda: "is UP" in (self._daemons.ask("scontrol", "ping") or ""), SETTLE_S, "slurmctld")

    def stop_database(self) -> None:
        self._database.stop()

    def start_database(self) -> None:
        self._database.start()

    # what its users do

    @property
    def env(self) -> dict[str, str]:
        """What a client has to be told by its environment."""
        return self._daemons.env

    def run(self, *argv: object, seconds: float = 60) -> str:
        """A client's output; what a job that this process is in would tell the client is left out.

        Raises:
            RuntimeError: it failed; with what it said.
        """
        words, env = [str(word) for word in argv], environment(**self.env)
        done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=seconds)
        if done.returncode:
            raise RuntimeError(f"{argv} ended with {done.returncode}: {done.stderr or done.stdout}")
        return done.stdout

    def jobs(self) -> list[str]:
        """Ids of all jobs that are not at their end."""
        return self.run("squeue", "--noheader", "--all", "--format=%A").split()

    def job(self, job_id: str | int) -> dict[str, str]:
        """All that the controller knows of a job, such as Reason and NodeList."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job_id)))

    def state(self, job_id: str | int) -> str:
        return self.job(job_id)["JobState"]

    def restarts(self, job_id: str | int) -> int:
        return int(self.job(job_id)["Restarts"])

    def cancel_all(self) -> None:
        """Returns when no job is left. A job on a crashed node is left until that is revived."""

        def none_left() -> bool:
            if ids := self.jobs():
                self._daemons.ask("scancel", *ids)  # again each time: one that was being requeued comes back
            return not ids

        self.wait_for(none_left, SETTLE_S, "the end of cancelled jobs")

    def wait_for(self, predicate: Callable[[], object], seconds: float, what: str) -> None:
        """Poll until `predicate` holds.

        Raises:
            TimeoutError: it did not within `seconds`; with the last lines of every daemon's log.
        """
        self._daemons.wait_for(predicate, seconds, what)

    # parts

    @property
    def _layout(self) -> Layout:
        network = find(self.folder)
        if network is None:
            raise UserError(f"no cluster is up in {self.folder}: python -m tests.cluster up {self.folder}")
        return Layout(self.folder, network, _host(), **self._shape)

    @property
    def _nodes(self) -> Nodes:
        return Nodes(self._layout, self._daemons)

    @property
    def _database(self) -> Database:
        return Database(self._layout, self._daemons)

    def _make_folders(self) -> None:
        for name in ("etc", "run", "log", "state", "spool", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(self._shape["gpus"]):
            device = self.folder / f"dev/nvidia{index}"
            if not device.exists():
                os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # as /dev/null: Slurm asks for a device

    def _start_munge(self) -> None:
        if self._daemons.running("munged"):
            return
        key, socket_ = self.folder / "munge.key", self.folder / "munge.sock"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(1024))
        places = {"key-file": key, "socket": socket_, "log-file": self.folder / "log/munged.log"}
        places |= {"pid-file": self.folder / "munged.pid", "seed-file": self.folder / "munge.seed"}
        options = [f"--{name}={place}" for name, place in places.items()]
        self._daemons.start("munged", "munged", "--foreground", "--force", "--num-threads=4", *options)
        self.wait_for(lambda: self._daemons.ask("munge", "--no-input", f"--socket={socket_}"), SETTLE_S, "munged")

    def _configure(self, network: Network) -> None:
        layout = Layout(self.folder, network, _host(), **self._shape)
        for name, text in files(layout).items():
            file = self.folder / "etc" / name
            file.write_text(text)
            file.chmod(0o600 if name == "slurmdbd.conf" else 0o644)  # slurmdbd refuses a password that others can read

    def _all_ready(self) -> bool:
        answer = self._daemons.ask("sinfo", "--noheader", "--Node", "--format=%N %T") or ""
        states = dict(line.split() for line in answer.splitlines())
        for node, state in states.items():
            if state.startswith("drain") or state == "down":  # by a test, or since a job of a crash would not end
                self._daemons.ask("scontrol", "update", f"nodename={node}", "state=resume")
        return len(states) == self._shape["nodes"] and set(states.values()) <= READY


def missing() -> str | None:
    """What this machine lacks for a cluster, or None."""
    if os.geteuid() != 0:
        return "only root can make nodes"
    absent = {package for program, package in _PROGRAMS.items() if shutil.which(program, path=PATH) is None}
    if absent:
        return f"apt-get install --no-install-recommends {' '.join(sorted(absent))}"
    namespaces = ["unshare", "--net", "--uts", "--mount-proc", "--pid", "--fork", "true"]
    if told := subprocess.run(namespaces, capture_output=True, text=True).stderr.strip():
        return f"root may not make namespaces ({told}); in a container: --privileged"
    return None


def _host() -> str:
    return socket.gethostname().partition(".")[0]
