"""What a run says of itself: log, progress, signals of health, what it was started by."""

from pretrain.telemetry.machine import StepClock, memory_gib
from pretrain.telemetry.provenance import provenance, versions
from pretrain.telemetry.runlog import RunLog, read_events, read_log
from pretrain.telemetry.signals import embedding_std, rankme

__all__ = [
    "RunLog",
    "StepClock",
    "embedding_std",
    "memory_gib",
    "provenance",
    "rankme",
    "read_events",
    "read_log",
    "versions",
]
