"""Losses that leap: told from the median of the steps before, with the samples that were in the batch."""

from __future__ import annotations

import json
import logging
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

FILE = "spikes.jsonl"
LEAST = 1e-3  # of the median: what counts as one deviation where a loss hardly moves


class Spikes:
    """Watches one loss a step; what is no number is no spike (see `faults.nan`)."""

    def __init__(self, factor: float, window: int) -> None:
        self.factor = factor
        self._last: deque[float] = deque(maxlen=window)

    def seen(self, loss: float) -> dict[str, float] | None:
        """Median and median deviation of the window before, where `loss` lies `factor` deviations above; it takes part
        in later windows either way. None before the window is half full."""
        before = list(self._last)
        if not np.isfinite(loss):
            return None
        self._last.append(loss)
        if 2 * len(before) < (self._last.maxlen or 0):
            return None
        median = statistics.median(before)
        deviation = max(statistics.median(abs(x - median) for x in before), LEAST * abs(median))
        if loss <= median + self.factor * deviation:
            return None
        return {"loss": loss, "median": median, "deviation": deviation}


def note_spike(folder: Path, step: int, figures: dict[str, Any], source: np.ndarray, ids: np.ndarray) -> None:
    """Append a spike and the samples of its global batch, [source, place in it] each, to the run's folder.

    `step` counts as the log and `replay` do: 1 is the first.
    """
    samples = np.stack([source, ids], axis=1).tolist()
    try:
        with open(folder / FILE, "a") as file:
            file.write(json.dumps({"step": step, **figures, "samples": samples}) + "\n")
    except OSError as error:  # a full disk must not end the training for a line of its diary
        log.warning("%s: spike not noted (%s)", folder / FILE, error.strerror)
