"""The nodes: each has network, processes, hostname, mounts and /dev/shm of its own; /tmp and all else are shared.

/tmp has to be: tests keep their runs there, and a run's folder is on a disk that all nodes see.
"""

from __future__ import annotations

import os
import socket
from contextlib import closing, suppress

from tests.cluster.config import Layout
from tests.cluster.process import Daemons, Process, children

_SETTLE_S = 10
_INIT = """\
set -e
read -r go
mount -t tmpfs -o size=2g,mode=1777 shm /dev/shm
mount --bind "$2/etc/hosts" /etc/hosts
hostname "$1"
slurmd -D -f "$2/etc/slurm.conf" -N "$1" </dev/null &
wait $!
"""
"""The first process of a node: it goes on when the cable is plugged in, and buries orphans while it waits."""


class Nodes:
    """Nodes n1, n2, … of a cluster; the first process of each is the daemon of that name, which ends all others."""

    def __init__(self, layout: Layout, daemons: Daemons) -> None:
        self._layout = layout
        self._daemons = daemons

    def start_missing(self) -> None:
        for index, name in enumerate(self._layout.names, start=1):
            if not self._daemons.running(name):
                self.crash(name)  # what is left of it
                self._start(index, name)

    def crash(self, name: str) -> None:
        """Power loss: all its processes end at once, and nobody is told."""
        self._daemons.end(name)
        self._daemons.end(_holder(name))

    def listening(self) -> bool:
        """Whether every slurmd takes messages."""
        for index in range(1, self._layout.nodes + 1):
            address = (self._layout.network.address(index), self._layout.node_port)
            with suppress(OSError), closing(socket.create_connection(address, timeout=1)):
                continue
            return False
        return True

    def _start(self, index: int, name: str) -> None:
        """The kernel makes the namespaces, then the cable comes from outside, then the node goes on."""
        reading, writing = os.pipe()
        unshare = ("unshare", "--net", "--uts", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child")
        init = ("sh", "-c", _INIT, "init", name, self._layout.folder)
        try:
            holder = self._daemons.start(_holder(name), *unshare, *init, stdin=reading)
            self._daemons.wait_for(lambda: children(holder.pid), _SETTLE_S, f"the namespaces of {name}")
            first = Process.of(children(holder.pid)[0])
            self._daemons.keep(name, first)
            self._layout.network.plug(index, first.pid)
            os.write(writing, b"go\n")
        finally:
            os.close(reading)
            os.close(writing)


def _holder(name: str) -> str:
    """Daemon that made a node's namespaces: parent of its first process."""
    return f"{name}-unshare"
