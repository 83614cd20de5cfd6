"""What a site's Slurm does to our jobs, told by its configuration: what it forbids, what it kills, what it keeps.

Pure functions of what `scontrol show config` and `scontrol show partition` print.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pretrain.cli_doctor import Problem
from slurm.profile import EARLY_S, Profile

SAVE_S = 30
"""A save of a large model may take that long."""


def settings(text: str) -> dict[str, str]:
    """Of `scontrol show config`, a line a setting."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def partitions(text: str) -> dict[str, dict[str, str]]:
    """Of `scontrol --oneliner show partition`, by name."""
    found = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in text.splitlines()]
    return {partition["PartitionName"]: partition for partition in found if "PartitionName" in partition}


def chosen(profile: Profile, partitions: Mapping[str, Mapping[str, str]]) -> str | None:
    """The partition that jobs of `profile` go to; None: there is none of that name, or no default."""
    if profile.partition:
        return profile.partition if profile.partition in partitions else None
    return next((name for name, partition in partitions.items() if partition.get("Default") == "YES"), None)


def problems(
    profile: Profile, nodes: int, config: Mapping[str, str], parts: Mapping[str, Mapping[str, str]]
) -> list[Problem]:
    """What would keep jobs of `profile` on `nodes` nodes from running, or from coming back."""
    name = chosen(profile, parts)
    if name is None:
        what = f"no partition {profile.partition}" if profile.partition else "no partition is the default"
        return [Problem(what, "sbatch refuses the job", f"--partition, or the profile's: {', '.join(parts)}")]
    part = parts[name]
    return [
        *_warning(profile), *_room(profile, nodes, name, part), *_preemption(name, config, part),
        *_accounting(profile, config),
    ]  # fmt: skip


def facts(config: Mapping[str, str], part: Mapping[str, str] | None) -> dict[str, object]:
    """What is good to know of the site."""
    told: dict[str, object] = {
        "slurm version": config.get("SLURM_VERSION", "unknown"),
        "requeue": "by default" if config.get("JobRequeue") == "1" else "only jobs that ask for it, as ours do",
        "preemption": f"{config.get('PreemptType', 'unknown')}, {config.get('PreemptMode', 'unknown')}",
        "kill wait": f"{config.get('KillWait', 'unknown')} from SIGTERM to SIGKILL",
        "accounting": config.get("AccountingStorageType", "unknown"),
    }
    if part is not None:
        told["partition"] = (
            f"{part['PartitionName']}: {part.get('TotalNodes')} nodes, at most {part.get('MaxTime')}, "
            f"preempted by {part.get('PreemptMode')} after {part.get('GraceTime')} s"
        )
    return told


def minutes(limit: str) -> float:
    """Slurm's days-hours:minutes:seconds; UNLIMITED is infinite."""
    if limit in ("UNLIMITED", "INFINITE", "NONE", ""):
        return float("inf")
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, minute, second = (*parts, 0, 0)[:3]
    else:
        hours, minute, second = (0,) * (3 - len(parts)) + tuple(parts) if len(parts) > 1 else (0, parts[0], 0)
    return int(days or 0) * 1440 + hours * 60 + minute + second / 60


def _warning(profile: Profile) -> list[Problem]:
    if 60 * profile.minutes > profile.signal_s + EARLY_S:
        return []
    what = (
        f"jobs ask for {profile.minutes} minutes, and are warned {profile.signal_s} s before that (Slurm may be "
        f"{EARLY_S} s early)"
    )
    why = "each is told to save and to go back into the queue as soon as it begins"
    return [Problem(what, why, "more --minutes, or a smaller signal_s in the profile")]


def _room(profile: Profile, nodes: int, name: str, part: Mapping[str, str]) -> list[Problem]:
    found = []
    if part.get("State") not in ("UP", None):
        why, do = "jobs wait there until it is opened", "ask an administrator, or another --partition"
        found.append(Problem(f"partition {name} is {part['State']}", why, do))
    if minutes(part.get("MaxTime", "")) < profile.minutes:
        what = f"jobs ask for {profile.minutes} minutes, partition {name} allows {part['MaxTime']}"
        do = "--minutes, or the profile's; a run that is longer goes back into the queue and goes on"
        found.append(Problem(what, "they wait for ever, or are refused", do))
    most = [int(n) for key in ("TotalNodes", "MaxNodes") if (n := part.get(key, "")).isdigit()]
    if most and nodes > min(most):
        what = f"{nodes} nodes are asked for, partition {name} gives at most {min(most)}"
        found.append(Problem(what, "the job waits for ever, or is refused", "fewer --nodes, or another --partition"))
    return found


def _preemption(name: str, config: Mapping[str, str], part: Mapping[str, str]) -> list[Problem]:
    mode = part.get("PreemptMode", "OFF")
    if "none" in config.get("PreemptType", "none") or mode == "OFF":
        return []
    if "CANCEL" in mode:
        why = "a run that is preempted is not put back into the queue"
        do = f"another --partition, or submit it again each time: `python -m slurm requeue RUN` (PreemptMode={mode})"
        return [Problem(f"partition {name} cancels jobs that it preempts", why, do)]
    grace_s = int(part.get("GraceTime", "0") or 0)
    if grace_s and "preempt_send_user_signal" in config.get("SlurmctldParameters", ""):
        return []  # the signal that the job asked for comes first
    left_s = grace_s or _seconds(config.get("KillWait", ""))
    if left_s >= SAVE_S:
        return []
    what = f"partition {name} preempts jobs with SIGTERM, {left_s} s before SIGKILL, and no signal before"
    why = "a save that takes longer is lost, with all steps since the one before"
    do = "a smaller checkpoint.every; or ask for preempt_send_user_signal (SlurmctldParameters) and a GraceTime"
    return [Problem(what, why, do)]


def _accounting(profile: Profile, config: Mapping[str, str]) -> list[Problem]:
    if "wckeys" not in config.get("AccountingStorageEnforce", "").lower() or profile.wckey:
        return []
    what = "this site accepts jobs with a wckey of its list only, and the profile has none"
    why = "a job without one gets your default key, and is refused where you have none"
    return [Problem(what, why, "wckey: … in the profile, one of `sacctmgr show wckey`")]


def _seconds(text: str) -> int:
    """'30 sec'."""
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0
