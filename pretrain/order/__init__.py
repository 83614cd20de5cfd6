"""Which sample when: the order of data as a pure function of (sources, seed, step). numpy only."""

from pretrain.order.order import MAX_LANES, ORDER_VERSION, Batch, SampleOrder

__all__ = ["MAX_LANES", "ORDER_VERSION", "Batch", "SampleOrder"]
