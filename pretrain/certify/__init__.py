"""A certificate that gradients are right: every backend, world and accumulation against float64 on one process.

`shrink.py` makes the recipe's towers small and `batch.py` its data; `reference.py` has the float64 gradients, by the
formulas of `textbook.py`; `cells.py` is what a backend gives, `peers.py` what others' losses give, `table.py` what is
said of it. `run.py` starts the worlds (`worlds.py`).
"""

from pretrain.certify.run import certify

__all__ = ["certify"]
