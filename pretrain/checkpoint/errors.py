"""What can be wrong with a checkpoint, as messages a person can act on."""

from __future__ import annotations

from pretrain.errors import UserError
from pretrain.exit_codes import CRASHED
from pretrain.patience import NO_FILE


class CheckpointError(UserError):
    """A checkpoint is missing, torn, damaged or of another shape than asked for; names file, tensor and
    remedy.
    """


class CheckpointDiskError(CheckpointError, OSError):
    """The disk refused a write (full, quota, permission); carries `errno` and `filename` like any OSError."""


class CheckpointTornError(CheckpointError):
    """A step folder without a manifest: its save was interrupted, or is still going on."""


class CheckpointUnreadableError(CheckpointError):
    """A place that does not answer, or may not be read: whether what lies there is whole is not known."""

    exit_code = CRASHED


class CheckpointUncertainError(CheckpointError):
    """A manifest was sent, and whether it has arrived cannot be told: its data must stay."""


def unreadable(what: str, error: OSError) -> CheckpointError:
    """What to raise where `what` could not be read: damage where there is no such file, else nothing is known of it."""
    if isinstance(error, NO_FILE):
        return CheckpointError(f"{what} cannot be read ({error.strerror}); use another checkpoint")
    return CheckpointUnreadableError(
        f"{what} cannot be read ({error.strerror}): see that the place answers and may be read; what lies there is "
        f"untouched, and the same command tries again"
    )
