"""Judge a trained encoder: retrieval, kNN and zero-shot accuracy over ranks, and a report of it all.

Evaluations run alone, or on many ranks under `torchrun` or `accelerate launch`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pretrain import cli

VERBS = {
    "retrieval": "downstream.cli_retrieval",
    "knn": "downstream.cli_knn",
    "zeroshot": "downstream.cli_zeroshot",
    "spectrum": "downstream.cli_spectrum",
    "relations": "downstream.cli_relations",
    "report": "downstream.cli_report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of ``python -m downstream ARGV``."""
    return cli.main("downstream", __doc__ or "", VERBS, argv)


if __name__ == "__main__":
    sys.exit(main())
