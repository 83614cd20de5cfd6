"""The network of a cluster: a bridge on this machine with a free subnet, on which every node hangs by a cable.

The bridge's alias is the cluster's folder, so the kernel itself knows whose it is; as its name can be given only once,
making it claims the subnet and the ports that go with it.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import UserError
from tests.cluster.process import PATH

PREFIX = "polyview"
NUMBERS = range(1, 200)
FIRST_PORT = 20000
"""Below 32768, where Linux begins to hand out ports to whoever connects."""


@dataclass(frozen=True)
class Network:
    """Number N has bridge polyviewN, subnet 10.77.N.0/24 and the ports from 20000 + 10 N on."""

    number: int

    @property
    def bridge(self) -> str:
        return f"{PREFIX}{self.number}"

    @property
    def subnet(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(f"10.77.{self.number}.0/24")

    @property
    def gateway(self) -> str:
        """This machine's own address on the bridge: where the controller and the database listen."""
        return f"10.77.{self.number}.254"

    def address(self, node: int) -> str:
        return f"10.77.{self.number}.{node}"

    @property
    def ports(self) -> range:
        return range(FIRST_PORT + 10 * self.number, FIRST_PORT + 10 * self.number + 4)

    def plug(self, node: int, pid: int) -> None:
        """Give process `pid`'s network namespace an eth0 with the node's address."""
        self.unplug(node)
        _ip("link", "add", self._cable(node), "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        _ip("link", "set", self._cable(node), "master", self.bridge, "up")
        inside = ("nsenter", f"--net=/proc/{pid}/ns/net", "ip")
        _run(*inside, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _run(*inside, "link", "set", link, "up")

    def unplug(self, node: int) -> None:
        with suppress(CommandFailed):  # it is not plugged in
            _ip("link", "del", self._cable(node))

    def cables(self) -> list[str]:
        """This machine's ends of the cables that are plugged in."""
        ports = Path(f"/sys/class/net/{self.bridge}/brif")
        return [cable.name for cable in ports.iterdir()] if ports.is_dir() else []

    def remove(self) -> None:
        for link in (*self.cables(), self.bridge):
            with suppress(CommandFailed):  # it went by itself, as a cable does some time after its node
                _ip("link", "del", link)

    def _cable(self, node: int) -> str:
        return f"pv{self.number}n{node}"


class CommandFailed(RuntimeError):
    """A command's exit code was not 0."""


def find(folder: Path) -> Network | None:
    """The network of the cluster in `folder`, where it has one."""
    return next((network for network, owner in _all() if owner == folder), None)


def claim(folder: Path) -> Network:
    """A free network for the cluster in `folder`.

    Raises:
        UserError: none can be made.
    """
    for number in NUMBERS:
        network = Network(number)
        if not _free(network):
            continue
        with suppress(FileExistsError):
            _make(network, folder)
            return network
    raise UserError(f"no subnet of 10.77.0.0/16 is free here: see `ip link show type bridge`, the {PREFIX}N among them")


def remove_abandoned(abandoned: Callable[[Path], bool]) -> None:
    """Remove the bridges that nothing hangs on and whose cluster, by its folder, is `abandoned`."""
    for network, folder in _all():
        if folder and not network.cables() and abandoned(folder):
            network.remove()


def _make(network: Network, folder: Path) -> None:
    try:
        _ip("link", "add", network.bridge, "type", "bridge")
    except CommandFailed as error:
        if "exists" in str(error):
            raise FileExistsError(network.bridge) from None
        raise UserError(f"no bridge can be made here, a node's network needs one: {error}") from None
    _ip("link", "set", network.bridge, "alias", str(folder))
    _ip("addr", "add", f"{network.gateway}/24", "dev", network.bridge)
    _ip("link", "set", network.bridge, "up")


def _all() -> list[tuple[Network, Path | None]]:
    """All clusters' networks on this machine, and the folders they are of."""
    found = []
    for link in json.loads(_ip("-json", "link", "show", "type", "bridge") or "[]"):
        number = link.get("ifname", "").removeprefix(PREFIX)  # iproute2 pads the list with empty entries
        if number.isdecimal():
            found.append((Network(int(number)), Path(link["ifalias"]) if "ifalias" in link else None))
    return found


def _free(network: Network) -> bool:
    """Whether nobody on this machine uses its name, its addresses and its ports."""
    if Path(f"/sys/class/net/{network.bridge}").exists():
        return False
    routes = [route["dst"] for route in json.loads(_ip("-json", "-4", "route", "show", "table", "all"))]
    if any(network.subnet.overlaps(_subnet(dst)) for dst in routes if dst != "default"):
        return False
    return all(_port_is_free(port) for port in network.ports)


def _subnet(destination: str) -> ipaddress.IPv4Network:
    return ipaddress.IPv4Network(destination, strict=False)


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            probe.bind(("", port))
            return True
    return False


def _ip(*argv: str) -> str:
    return _run("ip", *argv)


def _run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, env={"PATH": PATH, "LC_ALL": "C"})
    if done.returncode:
        raise CommandFailed(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout
