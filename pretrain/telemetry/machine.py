"""What a step costs: time, rate, wait, memory and use of the device since the last line of the log."""

from __future__ import annotations

import resource
import time

import torch

from pretrain.telemetry.mfu import device_peak_flops
from pretrain.telemetry.phases import Phases

GIB = 2**30


class StepClock:
    """Rates between two lines of the log.

    phases: read with it, where it is given. device, precision, world: what the flops of `needs` are set against.
    """

    def __init__(
        self,
        start_step: int,
        global_batch: int,
        *,
        phases: Phases | None = None,
        device: torch.device | None = None,
        precision: str = "fp32",
        world: int = 1,
    ) -> None:
        self._step, self._global_batch, self._time = start_step, global_batch, time.monotonic()
        self._phases, self._world, self._retries = phases, world, 0
        self._device = device or torch.device("cpu")
        self._peak = device_peak_flops(self._device, precision)
        self._step_flops: float | None = None

    def needs(self, step_flops: float) -> None:
        """Model flops of a step over all ranks: from here on "tflops" and, of a known device, "mfu" are given."""
        self._step_flops = step_flops

    def read(self, step: int, data_wait_s: float) -> dict[str, float]:
        """Figures of the steps since the last call: seconds a step, images a second over all ranks, the share of
        the time spent waiting for data, this rank's TFLOP/s and their share of the device's peak, its memory, and
        the mean seconds a step of every phase."""
        now = time.monotonic()
        steps, elapsed = max(1, step - self._step), max(now - self._time, 1e-9)
        self._step, self._time = step, now
        rates = {
            "step_s": elapsed / steps,
            "images_per_s": steps * self._global_batch / elapsed,
            "data_wait": min(1.0, data_wait_s / elapsed),
        }
        phases = self._phases.read(steps) if self._phases else {}
        return rates | self._use(elapsed / steps) | self._memory() | phases

    def _use(self, step_s: float) -> dict[str, float]:
        if self._step_flops is None:
            return {}
        achieved = self._step_flops / self._world / step_s
        return {"tflops": achieved / 1e12} | ({"mfu": achieved / self._peak} if self._peak else {})

    def _memory(self) -> dict[str, float]:
        """Of this rank, highest since the last call; without a GPU resident memory since its start."""
        if self._device.type != "cuda":
            return {"memory_gib": memory_gib()}
        stats = torch.cuda.memory_stats(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        reserved, retries = stats["reserved_bytes.all.peak"], stats["num_alloc_retries"]
        before, self._retries = self._retries, retries
        return {
            "memory_gib": stats["allocated_bytes.all.peak"] / GIB,
            "memory_reserved_gib": reserved / GIB,
            "memory_share": reserved / torch.cuda.get_device_properties(self._device).total_memory,
            "alloc_retries": retries - before,
        }


def memory_gib() -> float:
    """Peak memory of this process: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
