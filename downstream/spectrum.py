"""How many directions features use: the spectrum of their covariance, of the encoder and of what it was trained behind.

A collapsing encoder keeps a low loss while its features shrink to a few directions; the spectrum shows it. Taken of
features as they are, not of unit rows, which would hide a collapse of lengths. It says nothing about what the
directions are good for: kNN and the linear probe do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from downstream.evaluate import Evaluation
from downstream.features import image_features
from downstream.results import Result
from downstream.samples import Samples
from downstream.weights import Weights
from pretrain.distributed.groups import Group, resolve
from pretrain.errors import UserError
from pretrain.telemetry.signals import rankme

COUNTED = 1e-3  # of the largest value: a direction that counts
ENOUGH = 10  # samples a dimension
BLOCK = 4096  # rows through the projector at a time


@dataclass(frozen=True)
class Spectrum:
    """The covariance of features, sorted."""

    values: Tensor  # (D,) float64: singular values of the centred covariance, largest first
    rankme: float  # of the features as they are, Garrido's; see pretrain.telemetry.signals.rankme

    @property
    def directions(self) -> int:
        """How many values exceed a thousandth of the largest."""
        return int((self.values > COUNTED * self.values[0]).sum())

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the values' shares, between 1 and D; 0 where all values are 0."""
        total = self.values.sum()
        return float(torch.special.entr(self.values / total).sum().exp()) if total > 0 else 0.0


def spectrum(features: Tensor) -> Spectrum:
    """Of (N, D) features, computed in float64. ValueError for fewer than two rows."""
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"a spectrum needs features (N, D) of two rows or more, not {tuple(features.shape)}")
    x = features.double()
    centred = x - x.mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred / (len(x) - 1)).flip(0).clamp(min=0)
    # what rounding leaves of nothing
    floor = torch.finfo(torch.float32).eps ** 2 * float(x.square().sum(1).mean())
    return Spectrum(torch.where(values > floor, values, 0), rankme(x))


def evaluate_spectrum(
    weights: Weights, projector: tuple[str, nn.Module] | None, samples: Samples, *, group: Group = None
) -> Evaluation | None:
    """Spectra of the pooled features and, where there is one, of the projector's; None on all ranks but the first.

    projector: (its objective, the module), as `heads.open_projector` gives it.

    Raises:
        UserError: fewer than two images can be read.
    """
    features, whole = image_features(weights, samples, ("pooled",), group=group)
    if resolve(group)[1]:
        return None
    pooled = torch.from_numpy(features["pooled"][whole])
    if len(pooled) < 2:
        raise UserError(f"{samples.spec}: a spectrum needs two images or more; {len(pooled)} can be read")
    found = {"encoder": spectrum(pooled)}
    if projector is not None:
        found["projector"] = spectrum(_projected(projector[1], pooled, weights.encoder.device))
    metrics: dict[str, float | None] = {}
    for part, s in found.items():
        metrics |= {f"{part}_rankme": s.rankme, f"{part}_effective_rank": s.effective_rank}
        metrics[f"{part}_directions"] = float(s.directions)
    widths = {f"{part} dimensions": len(s.values) for part, s in found.items()}
    behind = {"projector_of": projector[0]} if projector else {}
    result = Result(
        dataset=samples.dataset,
        model=weights.encoder.model.image,
        pretrained=weights.name,
        task="spectrum",
        metrics=metrics,
        details=weights.origin()
        | {"features": "pooled", "counts": {"images": len(pooled), **widths}}
        | {"notes": _notes(len(pooled), found, int((~whole).sum()))}
        | behind,
    )
    return Evaluation(result, {"spectrum": {part: _relative(s.values) for part, s in found.items()}})


@torch.inference_mode()
def _projected(projector: nn.Module, pooled: Tensor, device: torch.device) -> Tensor:
    return torch.cat([projector(part.to(device)).cpu() for part in pooled.split(BLOCK)])


def _relative(values: Tensor) -> list[float]:
    """Shares of the largest, four digits; zeros where all are."""
    shares = (values / values[0]).numpy() if values[0] > 0 else np.zeros(len(values))
    return [float(f"{v:.4g}") for v in shares]


def _notes(images: int, found: dict[str, Spectrum], damaged: int) -> list[str]:
    said = [f"{damaged} images could not be read and are left out"] if damaged else []
    for part, s in found.items():
        if images < ENOUGH * len(s.values):
            said.append(
                f"{images:,} images for {len(s.values):,} dimensions of the {part}: the small values are set by the "
                f"sample; {ENOUGH} images a dimension are wanted"
            )
    return said
