"""What is wrong with a site for our jobs: its configuration read, and a short job run on its nodes.

Each problem says what is wrong, why it matters and what to do.
"""

from __future__ import annotations

import json
import platform
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pretrain.cli_doctor import Problem, version
from pretrain.errors import UserError
from slurm import probe, queue, site
from slurm.profile import Profile
from slurm.work import Resources, outside_jobs

COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "scancel", "sacct")
PROBE_MIN = 10
SKEW_S = 1.0
Report = dict[str, Any]


def examine(profile: Profile, nodes: int) -> tuple[dict[str, object], list[Problem]]:
    """Facts and problems of the site, asked from here; nothing runs on a node."""
    if missing := [command for command in COMMANDS if shutil.which(command) is None]:
        what, do = (
            f"no {', no '.join(missing)} on this machine",
            "install Slurm's clients, or log in to another machine",
        )
        return {}, [Problem(what, "jobs are sent, watched and put back into the queue with them", do)]
    try:
        up = queue.ask("scontrol", "ping")
        config = site.settings(queue.ask("scontrol", "show", "config"))
        parts = site.partitions(queue.ask("scontrol", "--oneliner", "show", "partition"))
    except UserError as error:
        return {}, [_controller(str(error))]
    found = [] if "is UP" in up else [_controller(up.strip())]
    name = site.chosen(profile, parts)
    facts = site.facts(config, parts.get(name) if name else None)
    return facts, [*found, *site.problems(profile, nodes, config, parts), *_accounts(config)]


def run_probe(profile: Profile, resources: Resources, folder: Path, tell: Callable[[str], None]) -> list[Report]:
    """Reports of all ranks of a short job that asks for what training would.

    Raises:
        UserError: the job did not run.
    """
    place = folder / f".doctor-{secrets.token_hex(4)}"
    argv = command(profile, resources, place)
    tell(f"a short job on {resources.nodes} node{'s' * (resources.nodes > 1)}: waiting for its turn")
    try:
        done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, env=outside_jobs())
        found = reports(done.stdout)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if not found:
        raise UserError(
            f"the job on {resources.nodes} nodes told nothing (exit code {done.returncode}); see above what srun says "
            f"to `{shlex.join(argv)}`"
        )
    return found


def command(profile: Profile, resources: Resources, place: Path) -> list[str]:
    """What starts the probe: srun with what sbatch would be told."""
    code = Path(__file__).resolve().parents[1]
    seen = (Path.cwd(), place.parent.absolute(), code)
    variables = {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1", "SUBMITIT_EXECUTOR": "slurm"} | profile.variables()
    python = profile.interpreter(seen)
    flags = {
        "nodes": resources.nodes, "ntasks-per-node": resources.ranks_per_node, "time": PROBE_MIN,
        "gpus-per-node": resources.gpus_per_node or None, "job-name": "polyview-doctor",
        **{name: getattr(profile, name) for name in ("partition", "account", "qos", "constraint", "reservation",
                                                     "exclude", "mem", "wckey")},
    }  # fmt: skip
    asked = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    lines = [*profile.setup, *exports, f"exec {python} -m slurm.probe {shlex.quote(str(place.absolute()))}"]
    return ["srun", *asked, *profile.srun_flags(resources.cpus_per_rank, seen), "bash", "-c", "\n".join(lines)]


def reports(text: str) -> list[Report]:
    """What the ranks printed, by rank; other output is passed over."""
    begin = probe.HEADER
    lines = (line[line.index(begin) + len(begin) :] for line in text.splitlines() if begin in line)
    return sorted((json.loads(line) for line in lines), key=lambda report: report["rank"])


def judge(found: Sequence[Report], resources: Resources, offline: bool) -> list[Problem]:
    """What is wrong by the reports of the ranks. offline: of the profile."""
    world = resources.nodes * resources.ranks_per_node
    problems = []
    if len(found) < world:
        silent = ", ".join(map(str, sorted(set(range(world)) - {r["rank"] for r in found})))
        why = "a run would wait for them"
        problems.append(Problem(f"ranks {silent} told nothing", why, "see what srun said above"))
    problems += _nodes(found, resources, offline)
    problems += _meeting(found, world)
    own = {Problem(**problem): report["host"] for report in reversed(found) for problem in report["problems"]}
    return problems + [problem._replace(what=f"{host}: {problem.what}") for problem, host in own.items()]


def _nodes(found: Sequence[Report], resources: Resources, offline: bool) -> list[Problem]:
    """What each node alone lacks."""
    problems = []
    if hosts := _hosts(r for r in found if not r["scontrol"]):
        why = "a job cannot put itself back into the queue from there (time limit, preemption)"
        problems.append(Problem(f"no scontrol that answers on {hosts}", why, "have Slurm's clients installed there"))
    here = {"python": platform.python_version(), **{name: version(name) for name in probe.PACKAGES}}
    for name, mine in here.items():
        if hosts := _hosts(r for r in found if r[name] != mine):
            theirs = ", ".join(sorted({str(r[name]) for r in found if r[name] != mine}))
            why, do = (
                "jobs are checked here and run there",
                "the same environment: `python:` or `container:` in the profile",
            )
            problems.append(Problem(f"{name} is {theirs} on {hosts}, {mine} here", why, do))
    gpus = resources.gpus_per_node
    if gpus and (hosts := _hosts(r for r in found if r["gpus"] != gpus)):
        sees = ", ".join(sorted({str(r["gpus"]) for r in found}))
        why, do = "ranks would share a GPU, or train without", "torch with CUDA, a driver that fits it, --gpus-per-node"
        problems.append(Problem(f"{gpus} GPUs a node are asked for, torch sees {sees} on {hosts}", why, do))
    if not offline and (hosts := _hosts(r for r in found if not r["online"] and not r["offline"])):
        why = "libraries wait for a network that does not answer, or fail"
        problems.append(Problem(f"no way to the internet from {hosts}", why, "offline: true in the profile"))
    if hosts := _hosts(r for r in found if r["cores"] < resources.cpus_per_rank):
        what = f"fewer than {resources.cpus_per_rank} cores for a rank on {hosts}"
        problems.append(Problem(what, "decoding of images waits for them", "--cpus-per-rank as the nodes have them"))
    return problems


def _meeting(found: Sequence[Report], world: int) -> list[Problem]:
    """What the nodes lack together."""
    problems = []
    if failed := [r for r in found if "failed" in r]:
        what = f"ranks do not meet: rank {failed[0]['rank']} on {failed[0]['host']}: {failed[0]['failed']}"
        do = "the network that nodes reach each other by: `interface: ib0` in the profile; ports 20000-31999 open"
        problems.append(Problem(what, "no run on several nodes begins", do))
    met = [r for r in found if "failed" not in r]
    if hosts := _hosts(r for r in met if r["seen"] < world):
        what = f"files of all nodes are not seen on {hosts}"
        why, do = "recipes, checkpoints and logs are read by all", "work in a folder that all nodes share"
        problems.append(Problem(what, why, do))
    elif hosts := _hosts(r for r in met if r["rank"] and not r["locked"]):
        why = "two starts of one run are not told apart by its lock"
        problems.append(
            Problem(
                f"a lock (flock) of one node does not hold on {hosts}",
                why,
                "mount with flock (Lustre), or local_lock=none (NFS)",
            )
        )
    if broken := [r for r in met if r.get("nccl", True) is not True]:
        what = f"NCCL fails on {_hosts(broken)}: {broken[0]['nccl']}"
        do = "`network:` and `interface:` in the profile; NCCL_DEBUG=INFO tells more"
        problems.append(Problem(what, "GPUs of several nodes cannot train together", do))
    clocks = [r["clock"] for r in met if "clock" in r]
    if clocks and max(clocks) - min(clocks) > SKEW_S:
        what = f"clocks of the nodes differ by {max(clocks) - min(clocks):.1f} s"
        problems.append(Problem(what, "who fell silent first, and what is newest, is told by time", "have NTP set up"))
    return problems


def _accounts(config: dict[str, str]) -> list[Problem]:
    why = "how a job ended that told nothing itself stays unknown: `status` says cut off"
    if "none" in config.get("AccountingStorageType", "none"):
        return [Problem("this site keeps no accounts", why, "ask for slurmdbd; training itself needs none")]
    try:
        queue.ask("sacct", "--noheader", "--starttime=now")
    except UserError as error:
        return [Problem(f"the accounting does not answer ({error})", why, "ask an administrator: slurmdbd")]
    return []


def _controller(said: str) -> Problem:
    do = "ask an administrator: slurmctld, munge; `scontrol ping`"
    return Problem(f"the controller does not answer: {said}", "nothing can be submitted", do)


def _hosts(found: Iterable[Report]) -> str:
    return ", ".join(dict.fromkeys(str(report["host"]) for report in found))
