"""A run that crashes at the same step again and again is not started once more: nodes are not burnt on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.exit_codes import CRASH_LOOP


def check(run: Path, starts: Sequence[Mapping[str, Any]], from_step: int, limit: int) -> None:
    """Refuse a start from `from_step` when the last `limit` of `starts` (of RUN/run.json) crashed from there too.

    A start that ended otherwise has noted how under `ended`. Every rank may call it, with what it read before rank 0
    notes the new start.

    Raises:
        UserError: with the step, and how to look into it and go on all the same.
    """
    crashes = consecutive_crashes(starts, from_step)
    if crashes >= limit:
        raise UserError(
            f"{run}: the last {crashes} starts from step {from_step} all ended in a crash before the next save "
            f"(hosts: {', '.join(_hosts(starts, from_step))}). See the log of the last one, and where its threads "
            f"stood in {run / 'heartbeat'}; `polyview replay {run} --step {from_step + 1}` shows the first batch "
            f"behind the checkpoint. Were they killed from outside, lower checkpoint.every. "
            f"To try once more: faults.max_crashes={crashes + 1}",
            exit_code=CRASH_LOOP,
        )


def consecutive_crashes(starts: Sequence[Mapping[str, Any]], from_step: int) -> int:
    """How many of the newest starts, without a break, began at `from_step` and crashed; refused ones do not count."""
    tried = [start for start in starts if start.get("ended") != "refused"]
    return sum(1 for _ in takewhile(lambda s: s.get("from_step") == from_step and "ended" not in s, reversed(tried)))


def _hosts(starts: Sequence[Mapping[str, Any]], from_step: int) -> list[str]:
    crashed = [start for start in starts if start.get("from_step") == from_step and "ended" not in start]
    return sorted({str(start.get("host", "unknown")) for start in crashed})
