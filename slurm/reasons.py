"""Why a job waits, in words a person understands, and what can be done."""

from __future__ import annotations

from slurm.queue import Queued

_WORDS = {
    "None": "Slurm has not looked at it yet",
    "Priority": "other jobs come first",
    "Resources": "waits for free nodes",
    "ReqNodeNotAvail": "nodes that it asks for are down, drained or reserved",
    "NodeDown": "a node that it asks for is down",
    "Cleaning": "its earlier attempt is still ending",
    "Dependency": "waits for another job to end well",
    "DependencyNeverSatisfied": "waits for a job that has failed, so it never starts: cancel it",
    "BeginTime": "may not begin yet (a job that was requeued rests for a moment)",
    "JobHeldUser": "held by its user: `scontrol release {job}`",
    "JobHeldAdmin": "held by an administrator: ask what is wrong",
    "job requeued in held state": "requeued and held: `scontrol release {job}`",
    "launch failed requeued held": "a node could not start it, and it is held: `scontrol release {job}`",
    "JobArrayTaskLimit": "the array lets no more of its elements run at once",
    "JobLaunchFailure": "a node could not start it: ask an administrator",
    "BadConstraints": "no node fits what it asks for: cancel it and ask for less",
    "PartitionNodeLimit": "asks for more nodes than the partition has or allows: --nodes, --partition",
    "PartitionTimeLimit": "asks for more time than the partition allows: --minutes",
    "PartitionDown": "the partition is closed to jobs",
    "PartitionInactive": "the partition is closed to jobs",
    "Reservation": "waits for its reservation to begin",
    "Licenses": "waits for licences",
    "InvalidAccount": "the account is not valid: --account",
    "InvalidQOS": "the quality of service is not valid: --qos",
    "AccountNotAllowed": "the partition does not take this account: --account, --partition",
    "QOSNotAllowed": "the partition does not take this quality of service: --qos, --partition",
    "QOSTimeLimit": "the quality of service has no time left",
    "MaxRequeueCount": "was put back into the queue as often as the site allows",
    "Prolog": "its nodes are being prepared",
}

_BEGINS = {
    "ReqNodeNotAvail": _WORDS["ReqNodeNotAvail"],
    "QOS": "a limit of the quality of service is reached",
    "MaxCpuPerAccount": "a limit of the account is reached",
    "Max": "a limit of this user is reached",
    "Assoc": "a limit of the account or of this user is reached",
    "Reserved for maintenance": "its nodes are reserved for maintenance",
}
"""Families of reasons, by how they begin; their own name is told too."""


def why(job: Queued) -> str:
    """What a waiting job waits for, and when it is expected to begin."""
    told = _words(job.reason.strip("()")).format(job=job.job)
    if job.starts in ("", "N/A") or not job.waits:
        return told
    return f"{told}; expected to begin {job.starts.replace('T', ' ')}"


def held(job: Queued) -> bool:
    """Whether a job waits for a person, not for its turn."""
    return job.waits and "held" in job.reason.lower()


def _words(reason: str) -> str:
    if reason in _WORDS:
        return _WORDS[reason]
    for begin, words in _BEGINS.items():
        if reason.startswith(begin):
            return f"{words} ({reason})"
    return reason
