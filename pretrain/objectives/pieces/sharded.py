"""State of which each rank holds a part: how it says where its parts lie, so that any world can take it up again.

A module is asked for its parts when a checkpoint is written, and filled part by part when one is read. It knows
nothing of files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Sharded(nn.Module, ABC):
    """A tensor `held` of the whole `shape`, spread over ranks; every element is in one part of one rank."""

    shape: tuple[int, ...]
    """Of the whole tensor, the same at any world."""
    held: Tensor
    """What this rank has of it."""

    def _hold(self, held: Tensor, *, whole: bool) -> None:
        """Keep `held`: an ordinary buffer where it is the whole, else one that only `parts` gives away."""
        self.register_buffer("held", held, persistent=whole)

    @property
    def whole(self) -> bool:
        """Whether this rank has all of it, as every other then does too."""
        return "held" not in self._non_persistent_buffers_set

    @abstractmethod
    def parts(self) -> list[tuple[int, Tensor]]:
        """(offset in the row-major whole, flat view of what this rank holds from there on), in rising order."""
