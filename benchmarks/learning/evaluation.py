"""One judge for all: kNN on frozen pooled features, and how many directions encoder and projector use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.learning import settings
from benchmarks.learning.data import Labelled
from downstream import classification, knn
from downstream.heads import open_projector
from downstream.spectrum import spectrum
from downstream.weights import open_weights
from pretrain.models.image import ImageTower
from pretrain.models.trunk import build_trunk

Figures = dict[str, float]
ROWS = 500


@torch.inference_mode()
def pooled(tower: ImageTower, images: Labelled) -> Tensor:
    """(N, C) features before any projection, of their own length."""
    tower.eval()
    return torch.cat([tower(part, ("pooled",))["pooled"].float() for part in images.pixels.split(ROWS)])


def neighbours(tower: ImageTower, bank: Labelled, queries: Labelled) -> Figures:
    """Accuracy by both protocols of `downstream knn`."""
    train, test = (F.normalize(pooled(tower, x), dim=1).numpy() for x in (bank, queries))
    similarity, found = knn.nearest(test, train, max(p.k for p in knn.PROTOCOLS), device="cpu")
    size = int(bank.labels.max()) + 1
    figures = {}
    for protocol in knn.PROTOCOLS:
        answers = knn.classify(similarity, bank.labels[found], queries.labels, size, size, protocol)
        figures[f"knn_{protocol.name}"] = float(np.float64(classification.metrics(answers)["acc1"]))
    return figures


def spectra(run: Path, queries: Labelled) -> Figures:
    """Of a run of ours: RankMe, and the effective rank of the centred covariance, of encoder and projector."""
    weights = open_weights(run, device="cpu")
    found = {"encoder": pooled(weights.trunk.image, queries)}
    opened = open_projector(weights, run)
    if opened is not None:
        found["projector"] = _through(opened[1], found["encoder"])
    figures: Figures = {}
    for part, features in found.items():
        s = spectrum(features)
        figures |= {f"{part}_rankme": s.rankme, f"{part}_rank": s.effective_rank}
        figures[f"{part}_directions"] = float(s.directions)
    return figures


@torch.inference_mode()
def _through(projector: nn.Module, features: Tensor) -> Tensor:
    return projector(features.clone()).clone()


def trained(run: Path, step: int | None = None) -> ImageTower:
    """The tower of a run of ours, at a snapshot or at its end."""
    path = run if step is None else run / "checkpoints" / f"step_{step:08d}"
    return open_weights(path, device="cpu").trunk.image


def untrained(seed: int) -> ImageTower:
    return build_trunk(settings.model(), seed=seed).image


def of_lightly(snapshot: Path) -> tuple[ImageTower, float]:
    """The tower of a snapshot of lightly's run, and its CPU seconds until then."""
    held = torch.load(snapshot, weights_only=True)
    tower = untrained(0)
    tower.backbone.load_state_dict(held["backbone"])
    return tower, float(held["cpu_s"])


def megaflops() -> float:
    """One image through the tower, forward; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        untrained(0)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    return counter.get_total_flops() / 1e6
