"""What can be wrong with a checkpoint, as messages a person can act on."""

from __future__ import annotations

from pretrain.errors import UserError


class CheckpointError(UserError):
    """A checkpoint is missing, torn, damaged or of another shape than asked for; names file, tensor and
    remedy.
    """


class CheckpointDiskError(CheckpointError, OSError):
    """The disk refused a write (full, quota, permission); carries `errno` and `filename` like any OSError."""


class CheckpointTornError(CheckpointError):
    """A step folder without a manifest: its save was interrupted, or is still going on."""
