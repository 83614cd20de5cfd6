"""Write the page of a run: how far it is, where its time goes, curves, events, recipe; one file, no server.

Training writes RUN/index.html by itself (log.page_every); this does it for any run, from its log.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, help="page to write (default RUN/index.html)")


def run(args: argparse.Namespace) -> int:
    from pretrain.telemetry.page import write_page

    print(write_page(args.run, args.out))
    return 0
