"""Which sample when: the order of data as a pure function of (sources, seed, step). numpy only."""

from pretrain.order.balanced import BALANCED_VERSION, BalancedOrder
from pretrain.order.base import Batch, Order
from pretrain.order.order import MAX_LANES, ORDER_VERSION, SampleOrder
from pretrain.order.skipping import SkippingOrder

__all__ = [
    "BALANCED_VERSION", "MAX_LANES", "ORDER_VERSION", "BalancedOrder", "Batch", "Order", "SampleOrder", "SkippingOrder",
]  # fmt: skip
