"""Numbers that show a collapsing representation before the loss does. Pure functions of features; no
communication: give them features gathered from all ranks, or read the figures as one rank's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rankme(features: Tensor, *, epsilon: float = 1e-7) -> float:
    """RankMe: the effective rank of `features` (N, D), between 1 and min(N, D); higher is healthier.

    exp(-sum p log p) with p = sigma / ||sigma||_1 + epsilon over the singular values of the features as they
    are, not centred (Garrido et al. 2023, "RankMe", eq. 3; they find 25,600 samples enough for D = 2,048).
    Computed in at least fp32. NaN for no rows or features that are not finite. Raises ValueError unless (N,
    D).
    """
    features = _matrix(features)
    if not len(features) or not torch.isfinite(features).all():
        return float("nan")
    sigma = torch.linalg.svdvals(features)
    p = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny) + epsilon
    return float(torch.exp(-(p * p.log()).sum()))


def embedding_std(features: Tensor) -> float:
    """Mean over dimensions of the standard deviation of L2-normalised rows of `features` (N, D).

    Near 1/sqrt(D) when the embeddings spread over the sphere, 0 when they have collapsed to one point (Chen &
    He 2021, "SimSiam", §4.1). 0 for one row, NaN for none. Raises ValueError unless (N, D).
    """
    features = _matrix(features)
    if len(features) < 2:
        return 0.0 if len(features) else float("nan")
    return float(torch.nn.functional.normalize(features, dim=1).std(dim=0).mean())


def _matrix(features: Tensor) -> Tensor:
    if features.dim() != 2:
        raise ValueError(f"features must be (N, D), not {tuple(features.shape)}")
    return features.detach().to(torch.promote_types(features.dtype, torch.float32))
