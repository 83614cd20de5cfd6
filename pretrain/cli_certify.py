"""Prove a recipe's gradients: every backend, world and accumulation against float64 on one process.

python -m pretrain certify RECIPE                                   all backends, worlds 1, 2, 3, towers made small
python -m pretrain certify RECIPE --backends ddp fsdp2 --worlds 2   some of them
python -m pretrain certify RECIPE --full                            towers at their own size: minutes to hours

Neither data nor a GPU is needed. The table is printed and kept as certificate.json and certificate.txt in the recipe's
output folder. Exit code 0 only when every cell passes (or is an approximation or a refusal that is stated), else 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.backend_names import BACKENDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for training")
    parser.add_argument("--full", action="store_true", help="leave the towers at their own size")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="default: 1 2 3")
    parser.add_argument(
        "--backends", nargs="+", choices=BACKENDS, default=BACKENDS, metavar="NAME", help="default: all"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to write (default OUTPUT/certificate.json)")


def run(args: argparse.Namespace) -> int:
    from pretrain.certify import certify
    from pretrain.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    certificate = certify(recipe, full=args.full, worlds=args.worlds, backends=args.backends)
    out = args.out or recipe.output / "certificate.json"
    certificate.write(out)
    print(certificate.text())
    print(f"certificate: {out}")
    return 0 if certificate.passed else 1
