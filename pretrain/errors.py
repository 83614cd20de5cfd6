"""The one exception a person is meant to read: doors print its message without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave or named is wrong; the message says what, where, and what to do."""
