"""The accounting of a cluster: a MariaDB with its files under the cluster's folder, and slurmdbd before it.

Without it sacct answers nothing, and who waits for a job by sacct waits for ever.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

from tests.cluster.config import CLUSTER, Layout
from tests.cluster.process import Daemons

PACKAGED = Path("/var/lib/mysql")
"""The data that Debian's package makes when it is installed."""
_SETTLE_S = 60
_USER = (
    "create database if not exists slurm_acct; create user if not exists slurm@'%' identified by 'slurm';"
    "grant all on slurm_acct.* to slurm@'%'"
)


class Database:
    """MariaDB and slurmdbd, started and stopped together."""

    def __init__(self, layout: Layout, daemons: Daemons) -> None:
        self._layout = layout
        self._daemons = daemons
        self._data = layout.folder / "mysql"
        self._socket = layout.folder / "mysql.sock"

    def start(self) -> None:
        """Start what does not run; returns when it answers and knows the cluster."""
        if self._daemons.running("mariadbd") and self._daemons.running("slurmdbd"):
            return
        self._start_mariadb()
        if not self._daemons.running("slurmdbd"):
            self._daemons.start("slurmdbd", "slurmdbd", "-D")
        self._daemons.wait_for(lambda: self._clusters() is not None, _SETTLE_S, "slurmdbd")
        if CLUSTER not in (self._clusters() or []):
            self._daemons.ask("sacctmgr", "--immediate", "add", "cluster", CLUSTER)

    def stop(self) -> None:
        for name in ("slurmdbd", "mariadbd"):
            self._daemons.end(name, signal.SIGTERM)

    def _start_mariadb(self) -> None:
        client = ("mariadb", "--no-defaults", "--socket", str(self._socket), "--execute")
        if not self._daemons.running("mariadbd"):
            if not (self._data / "mysql").is_dir():
                self._make_data()
            self._daemons.start("mariadbd", "mariadbd", *self._options())
        self._daemons.wait_for(lambda: self._daemons.ask(*client, "select 1") is not None, _SETTLE_S, "mariadbd")
        self._daemons.ask(*client, _USER)

    def _options(self) -> list[str]:
        """Small, and it need not survive a power loss."""
        return [
            "--no-defaults", "--user=root", f"--datadir={self._data}", f"--socket={self._socket}",
            f"--pid-file={self._data}/mariadbd.pid", f"--bind-address={self._layout.network.gateway}",
            f"--port={self._layout.sql_port}", "--skip-name-resolve", "--skip-log-bin",
            "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=32M", "--innodb-lock-wait-timeout=900",
            "--innodb-flush-log-at-trx-commit=0", "--innodb-autoextend-increment=4",
        ]  # fmt: skip

    def _make_data(self) -> None:
        """An empty data base: the package's own where nobody ever used it, which is faster by seconds."""
        shutil.rmtree(self._data, ignore_errors=True)
        if _unused():
            shutil.copytree(PACKAGED, self._data)
            return
        install = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={self._data}"]
        install += ["--auth-root-authentication-method=socket", "--skip-test-db", "--skip-name-resolve"]
        with (self._layout.folder / "log/mariadb-install-db.out").open("w") as log:
            subprocess.run(install, stdout=log, stderr=log, check=True)

    def _clusters(self) -> list[str] | None:
        """The clusters it knows; None when it does not answer."""
        answer = self._daemons.ask("sacctmgr", "--noheader", "list", "cluster", "format=cluster")
        return None if answer is None else answer.split()


def _unused() -> bool:
    """Whether the package's data are MariaDB's, as they were installed, and no server has them open."""
    bases = {path.name for path in PACKAGED.glob("*/")}
    own = bases == {"mysql", "performance_schema", "sys"} and (PACKAGED / "mysql/global_priv.frm").is_file()
    return own and not Path("/run/mysqld/mysqld.sock").exists()
