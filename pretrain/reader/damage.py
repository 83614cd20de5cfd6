"""How much damage a run puts up with: damaged samples are told one by one, and too large a share stops the
run.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from pretrain.errors import UserError
from pretrain.reader.batch import Batch

FIRST_ROWS = 1000  # the share is taken of at least this many rows, so that one bad sample early stops no run
SHOWN = 10
NOTED = 10_000  # a set whose every sample has a malformed member must not fill the disk with notes

log = logging.getLogger(__name__)


class DamageWatch:
    """Counts the damaged rows of the batches shown to it, in order; the same batches always stop at the same
    one. Members that were left out of good rows are told and counted apart, and stop nothing.

    `on_damage` gets a dict a row: step, row, source, id, shard, key, reason; and, for what was left out, `left_out`,
    the member. Of these only the first `NOTED` are given.
    """

    def __init__(self, max_share: float, on_damage: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._max_share = max_share
        self._on_damage = on_damage
        self._rows = 0
        self._seen: Counter[tuple[str, str, str]] = Counter()  # (shard, key, reason) -> times
        self._left_out = 0

    def show(self, batch: Batch) -> None:
        """Tell and count the batch's damage; UserError with a list once it is too much."""
        self._rows += len(batch)
        for damage in batch.damaged:
            if "left_out" in damage:
                self._count_left_out(damage)
            else:
                self._seen[damage["shard"], damage["key"], damage["reason"]] += 1
            if self._on_damage and not ("left_out" in damage and self._left_out > NOTED):
                self._on_damage(damage)
        if self._seen.total() > self._max_share * max(self._rows, FIRST_ROWS):
            raise UserError(self._message())

    def _count_left_out(self, damage: dict[str, Any]) -> None:
        """Warn of the first, the tenth, the hundredth …: a set may have the fault throughout."""
        self._left_out += 1
        if str(self._left_out).strip("0") == "1":
            log.warning(
                "%s: sample %s is used without what its .%s is for (%s); %d of %d rows so far lacked something so",
                damage["shard"], damage["key"], damage["left_out"], damage["reason"], self._left_out, self._rows,
            )  # fmt: skip

    def _advice(self) -> str:
        """A set that lacks a field throughout is the wrong set, not a damaged one."""
        reasons = Counter[str]()
        for (_, _, reason), n in self._seen.items():
            reasons[reason] += n
        reason, times = reasons.most_common(1)[0]
        if times == self._rows:
            return (
                f"Every sample has the same fault ({reason}): these shards lack what the objectives of this recipe need"
            )
        return "Mend or leave out these shards, or raise max_damaged"

    def _message(self) -> str:
        times, shards = self._seen.total(), Counter[str]()
        for (shard, _, _), n in self._seen.items():
            shards[shard] += n
        worst = sorted(self._seen, key=lambda sample: (-shards[sample[0]], sample))[:SHOWN]
        lines = [f"  {shard}: {key}: {reason}" for shard, key, reason in worst]
        more = len(self._seen) - len(lines)
        return "\n".join(
            [
                f"{times} of {self._rows} rows read by this rank are damaged, more than max_damaged = "
                f"{self._max_share:g} allows. Samples of the worst shards:",
                *lines,
                *([f"  and {more} more"] if more > 0 else []),
                self._advice(),
            ]
        )
