"""What a run says of itself: log, page, progress, signals of health, where its time goes, what it was started by."""

from pretrain.telemetry.garbage import collected_together
from pretrain.telemetry.machine import StepClock, memory_gib
from pretrain.telemetry.page import RunPage, write_page
from pretrain.telemetry.phases import Phases
from pretrain.telemetry.profiler import ProfileWindow
from pretrain.telemetry.provenance import provenance, versions
from pretrain.telemetry.runlog import RunLog, read_events, read_log
from pretrain.telemetry.signals import embedding_std, rankme

__all__ = [
    "Phases",
    "ProfileWindow",
    "RunLog",
    "RunPage",
    "StepClock",
    "collected_together",
    "embedding_std",
    "memory_gib",
    "provenance",
    "rankme",
    "read_events",
    "read_log",
    "versions",
    "write_page",
]
