"""Train, embed, build and publish the index, evaluate and report: jobs that wait for each other, from one command.

Example: python -m slurm pipeline clip-vit-b32-laion400m output=runs/b32 --nodes 4 --gpus-per-node 8 \\
             --shards data/flickr/test --out pipelines/b32 --parts 24

The same command goes on where it stopped: what is done stays, what waits or runs is left alone, what failed or was
cancelled is sent again, of the embedding only the elements that lack. In DIR: stages/ what is done, slurm/ logs,
embeddings/, collection/, results/, report.html; the run is the recipe's `output`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from slurm.options import add_resources
from slurm.stages import RESULTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from slurm.dispatch import Line
    from slurm.pipeline import Pipeline
    from slurm.profile import Profile
    from slurm.stages import Room
    from slurm.work import Resources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", help="a YAML file, or the name of a shipped recipe")
    add("overrides", nargs="*", metavar="key=value", help="for example optimizer.lr=1e-3 output=runs/b32")
    add("--shards", required=True, help="what to embed and to evaluate on: folder, glob or brace expression of tars")
    add("--train", metavar="SHARDS", help="labelled images that vote, for knn")
    add("--out", type=Path, required=True, metavar="DIR", help="the pipeline's folder, seen by all nodes")
    add("--collection", type=Path, help="publish into this one, beside what it holds (default: DIR/collection)")
    add(
        "--tasks", nargs="+", choices=RESULTS,
        help="evaluations (default: all that the towers, the data and --train allow)",
    )  # fmt: skip
    add("--parts", type=int, default=12, help="elements that share the embedding, at most one a tar (default 12)")
    add("--parallel", type=int, help="elements at once (default: as many as find room; with --local 1)")
    add_resources(parser)
    add("--embed-gpus", type=int, help="GPUs of an embedding or evaluating job (default: 1 where training has some)")
    add("--embed-cpus", type=int, help="its cores (default: --cpus-per-rank)")
    add("--embed-mem", help="memory of such jobs, and of building and reporting, such as 32G (default: the profile's)")
    add("--embed-minutes", type=int, help="its time limit (default: --minutes)")
    add("--embed-partition", help="its partition, and that of building and reporting (default: --partition)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--dry-run", action="store_true", help="print the scripts for sbatch; needs no Slurm")
    where.add_argument("--local", action="store_true", help="the very same jobs one after another on this machine")
    add("--wait", action="store_true", help="wait until all is done; exit code 1 when something failed")
    add("--json", action="store_true", help="the table as JSON")


def run(args: argparse.Namespace) -> int:
    from slurm.dispatch import ends, send_left, wait_for
    from slurm.pipeline import run_left, scripts

    pipeline = _pipeline(args)
    if args.dry_run:
        print("\n".join(scripts(pipeline)))
        return 0
    code = 0
    if args.local:
        run_left(pipeline, _say)
        lines = ends(pipeline)
    else:
        lines = send_left(pipeline)
        if args.wait:
            if not args.json:
                _show(lines, pipeline, False)
            code = wait_for(pipeline, _say)
            lines = ends(pipeline)
    _show(lines, pipeline, args.json)
    return code


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _pipeline(args: argparse.Namespace) -> Pipeline:
    from pretrain.errors import UserError
    from pretrain.recipe import load_recipe
    from slurm.options import resources_of, site
    from slurm.pipeline import Pipeline
    from slurm.profile import load_profile
    from slurm.stages import Asked, stages

    if args.parts < 1 or (args.parallel is not None and args.parallel < 1):
        raise UserError("--parts and --parallel must be at least 1")
    recipe, profile = load_recipe(args.recipe, args.overrides), site(args, load_profile(args.profile))
    asked = Asked(args.out, args.shards, args.train, args.collection, args.tasks, args.parts)
    rooms = _rooms(args, resources_of(args, profile, recipe.world), profile)
    return Pipeline(recipe, args.out.absolute(), stages(recipe, asked), rooms, args.parallel)


def _rooms(args: argparse.Namespace, training: Resources, profile: Profile) -> Mapping[Room, tuple[Resources, Profile]]:
    from slurm.pipeline import in_room
    from slurm.work import Resources

    gpus = min(1, training.gpus_per_node) if args.embed_gpus is None else args.embed_gpus
    said = {
        "cpus_per_rank": args.embed_cpus, "minutes": args.embed_minutes, "partition": args.embed_partition,
        "mem": args.embed_mem,
    }  # fmt: skip
    return {
        "train": (training, profile),
        "encoder": in_room(Resources(gpus_per_node=gpus), profile, **said),
        "files": in_room(Resources(), profile, **said),
    }


def _show(lines: Sequence[Line], pipeline: Pipeline, as_json: bool) -> None:
    report = pipeline.out / "report.html"
    done = all(line.state == "done" for line in lines)
    if as_json:
        told = {"stages": [line.as_dict() for line in lines], "logs": str(pipeline.folder), "run": str(pipeline.run)}
        print(json.dumps(told | {"report": str(report), "done": done}, indent=1))
        return
    rows = [("stage", "state", "job", "begins"), *(_row(line) for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(f"open {report}" if done else f"logs in {pipeline.folder} and {pipeline.run / 'slurm'}; then {report}")


def _row(line: Line) -> tuple[str, str, str, str]:
    begins = f"when {' and '.join(line.after)} ended well" if line.after else ""
    again = f" (before: {line.before})" if line.before else ""
    return line.stage, line.state + again, " ".join(line.jobs), begins
