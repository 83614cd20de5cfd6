"""Train a recipe: `python -m pretrain RECIPE`, or under `accelerate launch` / torchrun; the same command resumes."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys

from pretrain.cli import call
from pretrain.exit_codes import DONE, STOPPED, TABLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = TABLE
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optimizer.lr=1e-3 steps=500")
    parser.add_argument("--print-recipe", action="store_true", help="print the resolved recipe and stop")


def run(args: argparse.Namespace) -> int:
    from pretrain.recipe import dump_recipe, load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if args.print_recipe:
        print(dump_recipe(recipe), end="")
        return 0

    from pretrain.accelerate_config import resolve
    from pretrain.distributed.process import check_world, process_group
    from pretrain.launch import launched, run_world
    from pretrain.train import train  # before ranks are forked: once for all of them

    recipe = resolve(recipe, os.environ)
    if not launched():
        from pretrain.data import open_data
        from pretrain.run import RunFolder

        RunFolder(recipe.output).check(recipe)
        open_data(recipe)  # what is wrong with the data is said once, before any rank starts
        world = recipe.world or _gpus()
        if world > 1:
            print(f"starting {world} processes", file=sys.stderr, flush=True)
            return run_world(world, call, "pretrain train", __name__, [args.recipe, *args.overrides])

    check_world(recipe.world)
    with process_group(recipe.faults.hang_s) as process:
        return DONE if train(recipe, process) else STOPPED


def _gpus() -> int:
    import torch

    # asking may start CUDA, which ranks that are forked may not inherit: a child asks, and answers with its exit code
    child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(torch.cuda.device_count()))
    child.start()
    child.join()
    return max(1, child.exitcode or 0)
