"""Options that the evaluations share, and what they print at the end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.weights.which import add_weights

if TYPE_CHECKING:
    from downstream.evaluate import Evaluation


def add_encoder(parser: argparse.ArgumentParser) -> None:
    """CHECKPOINT, --out, --untrained or --weights, --name."""
    parser.add_argument("checkpoint", type=Path, help="a run folder, its checkpoints folder, or one step's folder")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the result (JSON) and its pictures"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--untrained", action="store_true", help="the same architecture before any training")
    add_weights(which)
    parser.add_argument("--name", help="what the result calls these weights (default: RUN@step_N, or untrained)")


def hand_over(done: Evaluation, out: Path) -> None:
    """Write an evaluation and print its figures."""
    from downstream.results import write

    path = write(done.result, out, done.pictures)
    result = done.result
    print(f"{result.task} on {result.dataset}: {result.pretrained} ({result.model})")
    for name, value in result.metrics.items():
        print(f"  {name:<32}{_line(value, result.intervals.get(name), result.chance.get(name))}")
    for note in result.details["notes"]:
        print(f"  note: {note}")
    print(f"  -> {path}")


def _line(value: float | None, interval: list[float] | None, chance: float | None) -> str:
    if value is None:
        return "undefined"
    between = f"  [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""
    return f"{value:.4g}{between}" + (f"  chance {chance:.3g}" if chance is not None else "")
