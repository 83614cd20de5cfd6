"""What the index refuses, as exceptions whose message a person is meant to read."""

from __future__ import annotations

from pretrain.errors import UserError


class BadInput(UserError, ValueError):
    """An argument cannot be searched or stored: wrong width, not finite, k < 1, an unknown filter column."""


class DamagedCollection(UserError):
    """A file of a collection is missing, cut short, altered or not what its manifest says."""


class WrongEncoder(UserError):
    """Vectors of two embedding spaces would be mixed."""


class StaleParent(UserError):
    """The version was built on another one than the one now current; publishing it would lose rows."""
