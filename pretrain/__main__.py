"""`python -m pretrain RECIPE [key=value …]` trains; `python -m pretrain VERB …` prepares data and looks into runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pretrain import cli

VERBS = {
    "train": "pretrain.cli_train",
    "check": "pretrain.cli_check",
    "pack": "pretrain.cli_pack",
    "verify": "pretrain.cli_verify",
    "enrich": "pretrain.cli_enrich",
    "digits": "pretrain.cli_digits",
    "replay": "pretrain.cli_replay",
    "certify": "pretrain.cli_certify",
    "page": "pretrain.cli_page",
    "profile": "pretrain.cli_profile",
    "export": "pretrain.cli_export",
    "doctor": "pretrain.cli_doctor",
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] not in VERBS and not argv[0].startswith("-"):
        argv = ["train", *argv]  # the common case needs no verb
    return cli.main("pretrain", __doc__, VERBS, argv)


if __name__ == "__main__":
    sys.exit(main())
