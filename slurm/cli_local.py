"""Train a recipe as a job on this machine and wait for it: `submit --local --wait`.

Example: python -m slurm local clip-vit-b32-laion400m --ranks-per-node 2 output=runs/b32
"""

from __future__ import annotations

import argparse

from slurm import cli_submit
from slurm.cli_submit import run

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cli_submit.add_arguments(parser)
    parser.set_defaults(local=True, wait=True)
