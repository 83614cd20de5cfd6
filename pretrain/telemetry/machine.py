"""What a step costs: time, rate, wait and memory since the last line of the log."""

from __future__ import annotations

import resource
import time

import torch


class StepClock:
    """Rates between two lines of the log."""

    def __init__(self, start_step: int, global_batch: int) -> None:
        self._step, self._global_batch, self._time = start_step, global_batch, time.monotonic()

    def read(self, step: int, data_wait_s: float) -> dict[str, float]:
        """Figures of the steps since the last call: seconds a step, images a second over all ranks, the share of
        the time spent waiting for data, peak memory of this rank in GiB."""
        now = time.monotonic()
        steps, elapsed = max(1, step - self._step), max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return {
            "step_s": elapsed / steps,
            "images_per_s": steps * self._global_batch / elapsed,
            "data_wait": min(1.0, data_wait_s / elapsed),
            "memory_gib": memory_gib(),
        }


def memory_gib() -> float:
    """Peak memory of this process: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
