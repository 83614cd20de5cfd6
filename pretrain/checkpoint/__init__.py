"""Checkpoints that any number of ranks write while training goes on, and any other number reads."""

from pretrain.checkpoint.agree import newest_whole
from pretrain.checkpoint.claim import claim, owners
from pretrain.checkpoint.commit import forestall
from pretrain.checkpoint.errors import CheckpointDiskError, CheckpointError
from pretrain.checkpoint.find import find_checkpoint, find_latest, open_checkpoint
from pretrain.checkpoint.fragments import Fragment, slice_for_rank
from pretrain.checkpoint.layout import step_dir
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.store import Store, Where, open_store
from pretrain.checkpoint.writer import CheckpointWriter, new_attempt

__all__ = [
    "Checkpoint",
    "CheckpointDiskError",
    "CheckpointError",
    "CheckpointWriter",
    "Fragment",
    "Store",
    "Where",
    "claim",
    "find_checkpoint",
    "find_latest",
    "forestall",
    "new_attempt",
    "newest_whole",
    "open_checkpoint",
    "open_store",
    "owners",
    "slice_for_rank",
    "step_dir",
]
