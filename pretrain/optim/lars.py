"""LARS (You et al. 2017, arXiv 1708.03888) as SwAV used it: apex's LARC(clip=False) around torch's SGD.

timm's Lars is the same but for a gradient that is all zero, where it decays the tensor at the full learning rate and
apex leaves it alone; and it takes "no weight decay" for "not adapted", which here is said by the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

EPS = 1e-8  # apex's


class Lars(torch.optim.SGD):
    """SGD whose gradient, tensor by tensor, is as long as `trust_coefficient` times the tensor.

    In groups with ``adapted``: g <- (g + wd·p) · trust·|p| / (|g| + wd·|p| + 1e-8). Where |p| or |g| is 0 the plain
    gradient is used, without decay. Other groups are plain SGD. A parameter without a gradient is skipped.
    """

    def __init__(self, params: Iterable[Any], *, trust_coefficient: float, **kind: Any) -> None:
        super().__init__(params, **kind)
        for group in self.param_groups:
            group["trust_coefficient"] = trust_coefficient

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; gradients of adapted groups are scaled in place."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            if group["adapted"]:
                _adapt([p for p in group["params"] if p.grad is not None], group)
                group["weight_decay"] = 0.0  # SGD's own: it is in the gradient now
        super().step()
        for group, decay in zip(self.param_groups, decays):
            group["weight_decay"] = decay
        return loss


def _adapt(parameters: list[Tensor], group: dict[str, Any]) -> None:
    """Decay and scale the gradients of `parameters`; nothing waits for the device."""
    if not parameters:
        return
    trust, decay = group["trust_coefficient"], group["weight_decay"]
    gradients: list[Any] = [p.grad for p in parameters]
    p_norm, g_norm = (torch.stack(torch._foreach_norm(x)) for x in (parameters, gradients))
    adapted = (p_norm > 0) & (g_norm > 0)
    ratio = torch.where(adapted, trust * p_norm / (g_norm + decay * p_norm + EPS), 1.0)
    decayed = torch._foreach_mul(parameters, list((adapted.to(p_norm) * decay).unbind()))
    torch._foreach_add_(gradients, decayed)
    torch._foreach_mul_(gradients, list(ratio.unbind()))
