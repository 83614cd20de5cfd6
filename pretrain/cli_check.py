"""Look at a recipe before it is run: data, model, memory, batch, schedule, time; what would refuse or spoil the run.

python -m pretrain check RECIPE data.sources.0.shards=SHARDS
python -m pretrain check RECIPE --world 8 --gpu-memory 80 --rate 6000     does it fit, and how long will it take
python -m pretrain check RECIPE --samples 12400000                        the shards are not on this machine

Nothing is started and nothing is written. Exit code 1 where there is a problem, else 0.
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for training")
    parser.add_argument("--world", type=int, metavar="N", help="ranks (default: the recipe's world, else 1)")
    parser.add_argument("--rate", type=float, metavar="IMAGES_PER_S", help="images/s of the whole job: gives the time")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of one GPU: says whether it fits")
    parser.add_argument("--samples", type=int, metavar="N", help="samples an epoch, where the shards are not here")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    from pretrain.check import check
    from pretrain.check.show import show
    from pretrain.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    report = check(
        recipe,
        world=args.world or recipe.world or 1,
        samples=args.samples,
        images_per_s=args.rate,
        gpu_bytes=round(args.gpu_memory * 2**30) if args.gpu_memory else None,
    )
    if args.json:
        print(json.dumps({**report.sections, "notes": report.notes, "problems": report.problems}, indent=1))
    else:
        print(show(report))
    return 1 if report.problems else 0
