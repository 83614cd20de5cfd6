"""A bank on a GPU: the same three products as `bank.Bank`, made by torch where the rows lie.

Only (queries, candidates) tables come back to the host. faiss's own GPU search is not needed for this:
torch's blocked product and topk is exact, is always there, and takes any float type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from index.errors import BadInput
from index.search.bank import AnyBank

SCORES = 2**26  # scores held at once: 256 MiB
GATHERED = 2**25  # float64 numbers gathered at once: 256 MiB


class DeviceBank(AnyBank):
    """Rows in a float tensor (N, D) on any device; refuses what `Bank` refuses."""

    def __init__(self, rows: Tensor):
        if rows.ndim != 2 or rows.shape[1] == 0 or not rows.is_floating_point():
            raise BadInput(f"bank: expected floats of shape (rows, dim), got {rows.dtype} {tuple(rows.shape)}")
        self._all = rows.detach()
        self.rows, self.dim = rows.shape
        self.extra = 2.0**-7 if _cuts_factors() else 0.0
        self.largest_norm = self._measure()

    def candidates(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        asked = self._here(queries)
        scores = ids = None
        for start, block in self._blocks(max(1024, SCORES // len(queries))):
            top, place = (asked @ block.T).topk(min(count, len(block)), sorted=False)
            scores = top if scores is None else torch.cat([scores, top], 1)
            ids = place + start if ids is None else torch.cat([ids, place + start], 1)
            scores, keep = scores.topk(min(count, scores.shape[1]), sorted=False)
            ids = ids.gather(1, keep)
        assert ids is not None  # count ≥ 1 rows were promised
        assert scores is not None
        return scores.cpu().numpy(), ids.cpu().numpy()

    def rescore(self, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
        step = max(1, GATHERED // (ids.shape[1] * self.dim))
        asked, places, out = self._here(queries).double(), torch.from_numpy(ids).to(self._all.device), []
        for lo in range(0, len(ids), step):
            rows = self._all[places[lo : lo + step]].float().double()  # (q, C, D)
            out.append((rows * asked[lo : lo + step, None]).sum(-1).float())
        return torch.cat(out).cpu().numpy()

    def all_scores(self, queries: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        asked = self._here(queries).double()
        for start, block in self._blocks(max(1024, SCORES // (8 * len(queries)))):
            yield start, (asked @ block.double().T).float().cpu().numpy()

    def _here(self, queries: np.ndarray) -> Tensor:
        return torch.from_numpy(queries).to(self._all.device)

    def _blocks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        for lo in range(0, self.rows, rows):
            yield lo, self._all[lo : lo + rows].float()

    def _measure(self) -> float:
        largest = 0.0
        for start, block in self._blocks(2**18):
            squares = block.square().sum(1)
            top = float(squares.max())  # NaN wins a maximum
            if not math.isfinite(top):
                row = start + int((~squares.isfinite()).nonzero()[0])
                raise BadInput(f"bank: row {row} is not finite, or too large for float32 products")
            largest = max(largest, top)
        return math.sqrt(largest)


def _cuts_factors() -> bool:
    """Whether torch is set to cut the factors of float32 products to TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() != "highest" or torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # torch's old and new settings were mixed and cannot be read: be careful
        return True
