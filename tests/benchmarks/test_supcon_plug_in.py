"""SupCon, a plug-in of one file: its loss against the paper's formula, and a damaged row that changes nothing."""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F

from pretrain.distributed.groups import LOCAL
from pretrain.objectives import build
from pretrain.objectives.base import RunFacts

NAME = "benchmarks.learning.supcon"
FACTS = RunFacts(pooled_dim=6, global_batch=8, total_steps=1, samples=8, seed=0)


def scored(labels: list[int], weight: list[float], first: torch.Tensor, second: torch.Tensor):
    supcon = build({NAME: {"hidden": 5, "dim": 4}}, FACTS)[NAME]
    batch = types.SimpleNamespace(labels=torch.tensor(labels), weight=torch.tensor(weight))
    features = dict(zip(supcon.requests(), (first, second)))
    return supcon, supcon.loss(features, batch, LOCAL).value, supcon.sample_losses(features, batch)


def plain(z: torch.Tensor, labels: list[int], temperature: float = 0.1) -> torch.Tensor:
    """L_out, term by term."""
    logits = z @ z.T / temperature
    total = torch.zeros(())
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        bottom = logits[i, others].exp().sum().log()
        total = total + sum(bottom - logits[i, p] for p in positives) / len(positives)
    return total / len(z)


def test_the_loss_is_the_paper_s():
    labels, views = [0, 1, 1, 2], torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    supcon, loss, rows = scored(labels, [1.0] * 4, *views)
    z = F.normalize(supcon.head(views.flatten(0, 1)), dim=1)
    torch.testing.assert_close(loss, plain(z, labels * 2))
    torch.testing.assert_close(rows.mean(), loss.detach())


def test_a_damaged_row_takes_no_part_whatever_it_holds():
    views = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    _, alone, _ = scored([0, 1, 1], [1.0] * 3, *views[:, :3])
    views[:, 3] = torch.nan
    supcon, loss, _ = scored([0, 1, 1, 2], [1.0, 1.0, 1.0, 0.0], *views)
    torch.testing.assert_close(loss, alone)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in supcon.parameters())
