"""The one exception a person is meant to read: doors print its message without a traceback."""

from __future__ import annotations

from pretrain.exit_codes import REFUSED


class UserError(Exception):
    """Something the user gave or named is wrong; the message says what, where, and what to do.

    `exit_code` is what the command ends with: one of `pretrain.exit_codes`.
    """

    exit_code = REFUSED
    told_already = False
    """Another rank has told of it in the same words: nobody needs to read it again."""

    def __init__(self, *args: object, exit_code: int | None = None) -> None:
        super().__init__(*args)
        if exit_code is not None:
            self.exit_code = exit_code
