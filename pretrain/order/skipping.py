"""An order with stretches left out: from a step on, so many batches of it are never seen.

What a run does that went back to a checkpoint because some batch broke it (PaLM, Chowdhery et al. 2022, §5.1): the
steps go on, the data of the broken stretch does not come again.
"""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.order.base import Batch, Order, refuse_other


class SkippingOrder(Order):
    """`order` without what `skips`, pairs (from_step, batches), leave out; pairs of one step add up."""

    def __init__(self, order: Order, skips: Sequence[tuple[int, int]]) -> None:
        self._order, self._skips = order, sorted(skips)
        self.seed, self.global_batch, self.samples = order.seed, order.global_batch, order.samples
        self.lanes, self.window, self.blocks = order.lanes, order.window, order.blocks

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        return self._order.batch(self._place(step), rank, world)

    def epoch_of(self, step: int) -> float:
        """Samples seen or left out before `step`, over all samples."""
        return self._order.epoch_of(self._place(step - 1) + 1) if step else 0.0

    def description(self) -> dict:
        return {**self._order.description(), "skips": [list(skip) for skip in self._skips]}

    def check_continues(self, saved: dict, step: int) -> None:
        """Raise UserError unless `saved` is this order, or one without the skips from `step` on."""
        before = [list(skip) for skip in self._skips if skip[0] < step]
        theirs = [skip for skip in saved.get("skips", []) if skip[0] < step]
        advice = "Resume with the settings of the run; what is left out anew begins at the step it resumes from"
        refuse_other({"skips": before}, {"skips": theirs}, step, advice)
        self._order.check_continues({name: part for name, part in saved.items() if name != "skips"}, step)

    def _place(self, step: int) -> int:
        """Of the batch of `step` in the whole order."""
        return step + sum(batches for from_step, batches in self._skips if from_step <= step)
