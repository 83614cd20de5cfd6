"""Run recipes on a cluster: the same commands, as Slurm jobs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pretrain import cli

VERBS = {
    "submit": "slurm.cli_submit",
    "pipeline": "slurm.cli_pipeline",
    "sweep": "slurm.cli_sweep",
    "local": "slurm.cli_local",
    "status": "slurm.cli_status",
    "logs": "slurm.cli_logs",
    "cancel": "slurm.cli_cancel",
    "requeue": "slurm.cli_requeue",
    "doctor": "slurm.cli_doctor",
}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main("slurm", __doc__ or "", VERBS, argv)


if __name__ == "__main__":
    sys.exit(main())
