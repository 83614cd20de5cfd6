"""Pseudo-labels where data has none: spherical k-means that goes along with training.

Rows of the global batch are assigned to centroids in equal shares (Sinkhorn), so no centroid takes all and none dies
in a batch; then each centroid moves a little towards the mean of its rows. The labels are clusters of what the trunk
sees at this moment, not classes: they drift as it learns, and nobody has named them.

Centroids are a replicated buffer, moved by one reduction, equal on all ranks. It keeps no label of any sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.distributed.collectives import all_gather_rows, all_reduce_sum
from pretrain.distributed.groups import Group
from pretrain.objectives.functional.assignment import sinkhorn
from pretrain.objectives.functional.reduction import at_least_fp32
from pretrain.philox import key, uniforms


class OnlineClusters(nn.Module):
    """`clusters` unit centroids of `dim`; `momentum` is how much of a centroid a step leaves."""

    centroids: Tensor
    begun: Tensor

    def __init__(
        self, clusters: int, dim: int, *, seed: int, momentum: float = 0.95, epsilon: float = 0.05, iterations: int = 3
    ) -> None:
        super().__init__()
        self.seed, self.momentum, self.epsilon, self.iterations = seed, momentum, epsilon, iterations
        self.register_buffer("centroids", torch.zeros(clusters, dim))
        self.register_buffer("begun", torch.zeros(1, dtype=torch.bool))
        self.used = torch.zeros(())
        """Share of the clusters that got a row in the last step."""
        self._has_begun = False

    @torch.no_grad()
    def forward(self, features: Tensor, weight: Tensor, group: Group = None) -> Tensor:
        """(b,) int64 cluster of each of this rank's rows, -1 where `weight` (b,) is 0; then centroids move.

        features: (b, dim), of any length; what rows of weight 0 hold does not matter. The first call chooses the
        centroids. Collective: all ranks, those without a row too.
        """
        x = self._unit(features, weight)
        centroids = self._present(x, weight, group)
        labels = self._assign(x, centroids, weight, group)
        self._move(x, labels, centroids, group)
        return labels

    @torch.no_grad()
    def assign(self, features: Tensor, weight: Tensor, group: Group = None) -> Tensor:
        """The labels `forward` would give, and nothing is remembered."""
        x = self._unit(features, weight)
        return self._assign(x, self._present(x, weight, group), weight, group)

    def _unit(self, features: Tensor, weight: Tensor) -> Tensor:
        x = at_least_fp32(features.detach()).to(self.centroids.dtype)
        return F.normalize(torch.where((weight > 0)[:, None], x, 0), dim=1)

    def _present(self, x: Tensor, weight: Tensor, group: Group) -> Tensor:
        """The centroids, or those that the first batch begins with."""
        self._has_begun = self._has_begun or bool(self.begun)  # asked of the device only until it is so
        return self.centroids if self._has_begun else self._chosen(x, weight, group)

    def _chosen(self, x: Tensor, weight: Tensor, group: Group) -> Tensor:
        """(K, dim) rows of the global batch in an order that the seed gives; beyond their number, rows with noise."""
        everyone = all_gather_rows(x, group)
        everyone = everyone[all_gather_rows(weight, group) > 0]
        if not len(everyone):
            return self.centroids
        draws = torch.from_numpy(uniforms(self.seed, 0, 0, range(len(everyone)), "clusters", 1)[:, 0])
        order = draws.argsort(stable=True).to(x.device)
        count, dim = self.centroids.shape
        chosen = everyone[order[torch.arange(count, device=x.device) % len(order)]]
        generator = torch.Generator().manual_seed(key(self.seed, "clusters") >> 1)
        noise = F.normalize(torch.randn(count, dim, generator=generator), dim=1).to(chosen)
        noise[: len(order)] = 0
        return F.normalize(chosen + noise, dim=1)

    def _assign(self, x: Tensor, centroids: Tensor, weight: Tensor, group: Group) -> Tensor:
        q = sinkhorn(
            x @ centroids.T, epsilon=self.epsilon, iterations=self.iterations, weight=weight, group=group
        )  # fmt: skip
        return torch.where(weight > 0, q.argmax(1), -1)

    def _move(self, x: Tensor, labels: Tensor, centroids: Tensor, group: Group) -> None:
        """Centroids towards the direction of their rows' global sum; a product, since index_add has no fixed order."""
        members = (labels[:, None] == torch.arange(len(centroids), device=x.device)).to(x.dtype)
        sums = all_reduce_sum(members.T @ torch.cat([x, torch.ones_like(x[:, :1])], dim=1), group)
        counts = sums[:, -1:]
        moved = F.normalize(centroids.lerp(F.normalize(sums[:, :-1], dim=1), 1 - self.momentum), dim=1)
        self.centroids.copy_(torch.where(counts > 0, moved, centroids))
        self.begun.logical_or_((counts > 0).any())
        self.used = (counts > 0).to(x.dtype).mean()
