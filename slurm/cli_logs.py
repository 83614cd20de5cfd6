"""What a rank of a run says: the end of its log, or with -f all that is added, over requeues and new jobs.

Training talks on stderr, of which rank 0 tells the progress; --out shows what submitit says. A log that is not there
yet is waited for with -f.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slurm.logs import Choice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run is over")
    parser.add_argument("--rank", type=int, default=0, help="whose log (default 0)")
    stream = parser.add_mutually_exclusive_group()
    stream.add_argument("--err", dest="stream", action="store_const", const="err", default="err", help="the default")
    stream.add_argument("--out", dest="stream", action="store_const", const="out", help="stdout instead")
    parser.add_argument("--attempt", type=int, metavar="K", help="of the attempts that `status RUN` lists, 1 the first")
    parser.add_argument("--lines", type=int, default=50, metavar="N", help="from the end (default 50)")
    parser.add_argument("--json", action="store_true", help='{"file", "lines"}; not with -f')


def run(args: argparse.Namespace) -> int:
    from pretrain.errors import UserError
    from slurm.logs import Choice
    from slurm.status import is_run

    if not is_run(args.run):
        raise UserError(f"{args.run} is not a run: it has no recipe.yaml, and no job of it was submitted")
    if args.follow and (args.json or args.attempt is not None):
        raise UserError("-f follows the newest job as it talks: leave out --json and --attempt")
    if args.rank < 0 or args.lines < 0:
        raise UserError("--rank and --lines count from 0")
    choice = Choice(args.run, args.rank, args.stream, args.attempt)
    if args.follow:
        return _follow(choice, args.lines)
    text = choice.text(args.lines)
    if args.json:
        import json

        print(json.dumps({"file": str(choice.file()), "lines": text.decode(errors="replace").splitlines()}, indent=1))
    else:
        _print(text)
    return 0


def _follow(choice: Choice, lines: int) -> int:
    from slurm.logs import follow

    try:
        for text in follow(choice, lines, lambda told: print(told, file=sys.stderr, flush=True)):
            _print(text)
    except KeyboardInterrupt:
        return 0  # the way to leave
    return 0


def _print(text: bytes) -> None:
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
