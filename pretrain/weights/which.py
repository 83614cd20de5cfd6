"""Which of a checkpoint's weights: a name for code, an option for commands. Imports nothing heavy."""

from __future__ import annotations

import argparse
from typing import Literal, get_args

Which = Literal["model", "teacher", "ema"]
"""What was trained, the momentum teacher that followed it, or the running average kept beside it."""


def add_weights(parser: argparse._ActionsContainer) -> None:
    """`--weights {model,teacher,ema}`."""
    parser.add_argument(
        "--weights",
        choices=get_args(Which),
        default="model",
        help="what was trained, its momentum teacher (DINO, MoCo), or its running average (recipe: ema); default model",
    )
