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
from pretrain.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for training")
    parser.add_argument("--full", action="store_true", help="leave the towers at their own size")
    parser.add_argument("--worlds", nargs="+", default=["1", "2", "3"], metavar="N", help="default: 1 2 3")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, metavar="NAME", help="default: all")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to write (default OUTPUT/certificate.json)")


def run(args: argparse.Namespace) -> int:
    from pretrain.certify import certify
    from pretrain.recipe import load_recipe

    # an override may stand behind a list, which takes it for one of its own
    asked = [*args.overrides, *args.worlds, *args.backends]
    recipe = load_recipe(args.recipe, [word for word in asked if "=" in word])
    worlds, backends = ([word for word in words if "=" not in word] for words in (args.worlds, args.backends))
    if wrong := [word for word in worlds if not word.isdecimal() or word == "0"]:
        raise UserError(f"--worlds {wrong[0]}: not a number of ranks")
    if wrong := [word for word in backends if word not in BACKENDS]:
        raise UserError(f"--backends {wrong[0]}: not one of {', '.join(BACKENDS)}")
    certificate = certify(recipe, full=args.full, worlds=[int(word) for word in worlds], backends=backends)
    out = args.out or recipe.output / "certificate.json"
    certificate.write(out)
    print(certificate.text())
    print(f"certificate: {out}")
    return 0 if certificate.passed else 1
