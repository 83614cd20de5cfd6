"""What a run says of itself: log, page, progress, signals of health, where its time goes, what it was started by.

Names are looked up when they are first used: whoever only looks at a run (`alive`, `progress`) needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pretrain.telemetry.provenance import provenance, versions

if TYPE_CHECKING:
    from pretrain.telemetry.garbage import collected_together
    from pretrain.telemetry.machine import StepClock, memory_gib
    from pretrain.telemetry.page import RunPage, write_page
    from pretrain.telemetry.phases import Phases
    from pretrain.telemetry.profiler import ProfileWindow
    from pretrain.telemetry.runlog import RunLog, read_events, read_log
    from pretrain.telemetry.signals import embedding_std, rankme

_MODULES = {
    "garbage": ["collected_together"],
    "machine": ["StepClock", "memory_gib"],
    "page": ["RunPage", "write_page"],
    "phases": ["Phases"],
    "profiler": ["ProfileWindow"],
    "runlog": ["RunLog", "read_events", "read_log"],
    "signals": ["embedding_std", "rankme"],
}

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


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
