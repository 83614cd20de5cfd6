"""Sample ids -> batches of decoded crops and tokens."""

from pretrain.reader.batch import Batch
from pretrain.reader.reader import Reader

__all__ = ["Batch", "Reader"]
