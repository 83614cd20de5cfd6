"""Each pair's own contrastive loss, written out: N x N in memory, for looking at a batch, not for training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def pair_losses(
    image: Tensor, text: Tensor, logit_scale: Tensor, ids: Tensor, *, smoothing: float = 0.0, softened: bool = False
) -> Tensor:
    """(N,) the mean of both directions' cross-entropies of every pair; all rows of the global batch, all present.

    `smoothing` and `softened` are those of `contrastive.Setting`. The mean over pairs is the loss.
    """
    logits = logit_scale.exp() * image @ text.T
    absent = (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    candidates = (~absent).sum(dim=1)
    share = smoothing * candidates / (candidates - 1).clamp(min=1) * (candidates > 1) if softened else smoothing
    total = logits.new_zeros(len(logits))
    for scores in (logits, logits.T):
        log_p = scores.masked_fill(absent, -torch.inf).log_softmax(dim=1)
        spread = log_p.masked_fill(absent, 0.0).sum(dim=1) / candidates
        total -= (1 - share) * log_p.diagonal() + share * spread
    return total / 2


@torch.no_grad()
def sigmoid_pair_losses(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, ids: Tensor) -> Tensor:
    """(N,) SigLIP's loss of every pair, half of each wrong match on either side; rows as for `pair_losses`."""
    logits = logit_scale.exp() * image @ text.T + logit_bias
    wrong = F.softplus(logits).masked_fill(ids[:, None] == ids, 0.0)
    return F.softplus(-logits.diagonal()) + (wrong.sum(0) + wrong.sum(1)) / 2
