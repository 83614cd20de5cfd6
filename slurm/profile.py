"""A site's profile: what every job there asks for and how its processes are started, in one YAML file.

`--profile NAME` is a file, or NAME.yaml in ./profiles, in ~/.config/polyview/profiles, or among the shipped ones; the
variable POLYVIEW_PROFILE names the one that is meant where none is given. Flags of a command come before it.
"""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from pretrain.errors import UserError
from pretrain.recipe.base import Part
from pretrain.recipe.reading import mapping, parse

SHIPPED = Path(__file__).parent / "profiles"

EARLY_S = 60
"""Seconds that Slurm's warning may come early: it looks at its clock once a minute (sbatch, --signal)."""

NETWORKS = {
    "ethernet": {"NCCL_IB_DISABLE": "1"},
    "infiniband": {"NCCL_IB_DISABLE": "0", "NCCL_IB_TIMEOUT": "22", "NCCL_IB_RETRY_CNT": "7"},
    "efa": {"FI_PROVIDER": "efa", "FI_EFA_USE_HUGE_PAGE": "0", "NCCL_TUNER_PLUGIN": "libnccl-ofi-tuner.so"},
}
"""Variables for the networks that GPU clusters have: timeouts that survive a switch's restart, EFA through libfabric
(aws-ofi-nccl must be in the library path; no huge pages, since with them a fork fails)."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline"}
"""What keeps libraries from asking a network that is not there."""


class Container(Part):
    """The image that a job's processes run in; the site's `setup` runs outside of it."""

    kind: Literal["apptainer", "pyxis"]
    image: str
    """A .sif file, or what the site's pyxis takes."""
    binds: tuple[str, ...] = ()
    """Folders that are seen inside, `HOST:INSIDE`; the working, run and code folders always are. Data too."""
    python: str = "python"
    """The interpreter inside."""
    options: tuple[str, ...] = ()
    """More flags of `apptainer exec`."""


class Profile(Part):
    """What is the same for all jobs of a site."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclude: str | None = None
    """Nodes that are never taken, as Slurm writes them: `n[3,7-9]`."""
    gpus_per_node: int | None = Field(default=None, ge=0)
    ranks_per_node: int | None = Field(default=None, ge=1)
    """null: one a GPU, else the recipe's world over the nodes."""
    cpus_per_rank: int = Field(default=4, ge=1)
    mem: str | None = None
    """Memory a node, as Slurm takes it (`480G`, `0` for all); null: the partition's default."""
    minutes: int = Field(default=60, ge=1)
    """Time limit of a job. A run that is longer is put back into the queue and goes on."""
    signal_s: int = Field(default=120, ge=10)
    """Seconds before the limit at which a run is asked to save and go back into the queue: more than a save takes."""
    max_restarts: int = Field(default=50, ge=0)
    """Times a job is put back into the queue before it is left to a person."""
    setup: tuple[str, ...] = ()
    """Shell lines before the processes start, on the first node: `module load cuda`, `source …`."""
    env: dict[str, str] = {}
    """Variables for all processes."""
    network: Literal["ethernet", "infiniband", "efa"] | None = None
    """A preset of variables for NCCL; `env` comes after it."""
    interface: str | None = None
    """The network interface that ranks meet over (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), such as `ib0`."""
    offline: bool = False
    """Nodes without internet: libraries are told not to ask for it."""
    python: str | None = None
    """The shell command that starts Python on the nodes, with a container outside of it; null: this one."""
    container: Container | None = None
    srun: tuple[str, ...] = ("--kill-on-bad-exit=1",)
    """More flags of srun."""
    sbatch: dict[str, str | int | bool] = {}
    """More flags of sbatch: `{mail-type: END, comment: pretraining}`; null of them are checked."""
    wckey: str | None = None

    @field_validator("interface", "partition", "account", "qos")
    @classmethod
    def _one_word(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("is empty; leave it out")
        return value

    def variables(self) -> dict[str, str]:
        """All variables that jobs get."""
        found = dict(NETWORKS.get(self.network or "", {}))
        if self.interface:
            found |= {"NCCL_SOCKET_IFNAME": self.interface, "GLOO_SOCKET_IFNAME": self.interface}
        return found | (OFFLINE if self.offline else {}) | self.env

    def interpreter(self, seen: tuple[Path, ...]) -> str:
        """The shell command that starts Python on a node, with folders `seen` inside of a container."""
        box = self.container
        if box is None:
            return self.python or shlex.quote(sys.executable)
        if box.kind == "pyxis":  # srun itself starts it in the image
            return box.python
        binds = [*box.binds, *(f"{folder}:{folder}" for folder in seen)]
        words = ["apptainer", "exec", *box.options, f"--pwd={Path.cwd()}", *(f"--bind={b}" for b in binds), box.image]
        return shlex.join([*words, *shlex.split(box.python)])

    def srun_flags(self, cpus_per_rank: int, seen: tuple[Path, ...]) -> list[str]:
        """Flags of srun; srun does not take the cores from sbatch (since Slurm 22.05)."""
        flags = [f"--cpus-per-task={cpus_per_rank}", *self.srun]
        if self.container and self.container.kind == "pyxis":
            mounts = [*self.container.binds, *(f"{folder}:{folder}" for folder in seen)]
            flags += [f"--container-image={self.container.image}", f"--container-mounts={','.join(mounts)}"]
            flags += [f"--container-workdir={Path.cwd()}"]
        return flags


def load_profile(name: str | None) -> Profile:
    """The profile `name`, or the one POLYVIEW_PROFILE names, or one of Slurm's defaults alone.

    Raises:
        UserError: there is none of that name, or it has an unknown key (with the nearest right one) or a wrong value.
    """
    name = name or os.environ.get("POLYVIEW_PROFILE")
    if not name:
        return Profile()
    file = _find(name)
    return parse(Profile, mapping(file.read_text(), str(file)), f"profile {file}")


def known() -> list[str]:
    """Names of the profiles that can be given."""
    return sorted({file.stem for folder in _folders() for file in folder.glob("*.yaml")})


def _find(name: str) -> Path:
    for file in (Path(name), *(folder / f"{name}.yaml" for folder in _folders())):
        if file.is_file():
            return file
    near = difflib.get_close_matches(name, known(), n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known())}"
    raise UserError(f"no profile {name}: neither a file, nor {name}.yaml in {', '.join(map(str, _folders()))}{hint}")


def _folders() -> list[Path]:
    own = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [Path("profiles"), own / "polyview" / "profiles", SHIPPED]
