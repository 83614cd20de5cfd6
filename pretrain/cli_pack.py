"""make shards of a folder, a table of captions, COCO or a tar of images; or take WebDataset tars as they are

python -m pretrain pack photos/ --out data/photos                     one subfolder a class, or all flat
python -m pretrain pack captions.tsv --images photos --out data/pairs --holdout 200
python -m pretrain pack coco/annotations/captions_train2017.json --out data/coco
python -m pretrain pack cifar10.tar.gz --subdir train --out data/cifar
python -m pretrain pack shards/                                       tars made elsewhere: indexed, not copied
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.errors import UserError

if TYPE_CHECKING:
    from pretrain.shards.entries import Listing, Skip

FORMATS = ("folder", "table", "coco", "webdataset")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("input", nargs="+", metavar="INPUT", help="what to pack (several only for tars taken as they are)")
    add("--out", type=Path, help="new folder for the shards; with --holdout it gets train/ and test/")
    add("--format", choices=FORMATS, help="what INPUT is (default: guessed)")
    add(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder that the table's or COCO's image names are relative to",
    )
    add("--columns", metavar="IMAGE,CAPTION", help="the table's columns, by header name or by number from 0")
    add("--instances", type=Path, metavar="JSON", help="COCO instances, when they are not beside the captions")
    add("--subdir", metavar="NAME", help="take only this folder of INPUT, such as train")
    add("--flat", action="store_true", help="subfolders are no classes")
    add(
        "--holdout",
        type=int,
        default=0,
        metavar="N",
        help="put N samples, chosen by hash of the name, into test/",
    )
    add("--limit", type=int, metavar="N", help="take N samples (the first in packed order)")
    add("--sorted", action="store_true", help="keep samples sorted by name instead of shuffled")
    add("--shuffle-seed", type=int, default=0, metavar="S", help="another S gives another order (default 0)")
    add("--shard-size", type=int, default=10_000, metavar="N", help="samples a shard at most (default 10000)")
    add(
        "--shard-bytes",
        type=_bytes,
        default=1 << 30,
        metavar="SIZE",
        help="bytes a shard at most (default 1G)",
    )
    add(
        "--check",
        choices=("header", "decode"),
        default="header",
        help="decode every image (default: its header)",
    )
    add("--threads", type=int, default=min(16, 2 * (os.cpu_count() or 1)), metavar="N", help="readers at once")


def run(args: argparse.Namespace) -> int:
    from pretrain.shards.importers import guess_format
    from pretrain.shards.index import compression

    inputs = [Path(name) for name in args.input]
    pattern = any(c in args.input[0] for c in "*?[{")
    if len(inputs) == 1 and not inputs[0].exists() and not pattern:
        raise UserError(f"no file or folder {inputs[0]}")
    if len(inputs) > 1 or pattern:  # several tars, a glob or a brace expression
        return _adopt(args)
    form = args.format
    if inputs[0].is_file() and compression(inputs[0]):
        return _pack(args, inputs[0], form, compressed=True)
    form = form or guess_format(inputs[0])
    return _adopt(args) if form == "webdataset" else _pack(args, inputs[0], form)


def _bytes(text: str) -> int:
    try:
        return int(float(text[:-1]) * UNITS[text[-1].upper()]) if text[-1:].upper() in UNITS else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 500M or 2G") from None


def _pack(args: argparse.Namespace, path: Path, form: str | None, compressed: bool = False) -> int:
    from pretrain.shards.pack import RENAMED, PackOptions, pack

    if args.out is None:
        raise UserError("say where the shards go: --out FOLDER")
    seed = None if args.sorted else args.shuffle_seed
    options = PackOptions(args.shard_size, args.shard_bytes, seed, args.holdout, args.limit, args.threads)
    with named_errors(args.out), _listing(args, path, form, compressed) as listing:
        total = min(len(listing.entries), args.limit or len(listing.entries))
        with progress("packing", total) as advance:
            done, skips = pack(listing, args.out, options, _checker(args.check), advance=advance)
    for split in done:
        print(f"{split.folder}: {split.samples:,} samples in {split.shards} shard(s), {split.bytes / 2**20:,.1f} MiB")
    if (args.out / RENAMED).is_file():
        print(
            f"some names made no key as they were (spaces, dots, other letters): {RENAMED} beside the shards has both"
        )
    if listing.classnames:
        more = " …" if len(listing.classnames) > 8 else ""
        print(f"{len(listing.classnames)} classes: {', '.join(listing.classnames[:8])}{more}")
    _print_skips(skips, args.out)
    return 0


@contextlib.contextmanager
def _listing(args: argparse.Namespace, path: Path, form: str | None, compressed: bool) -> Iterator[Listing]:
    """What there is to pack; a compressed tar is unpacked beside the output for as long as it is needed."""
    from pretrain.shards.importers import guess_tar, list_input, unpack

    options = {name: getattr(args, name) for name in ("images", "columns", "instances", "subdir", "flat")}
    if not compressed:
        yield list_input(path, form or "", **options)
        return
    args.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.absolute().parent, prefix=".unpacked-") as folder:
        plain, skips = unpack(path, Path(folder))
        listing = list_input(plain, form or guess_tar(plain), shown=path, **options)
        listing.skips = skips + listing.skips
        yield listing


def _checker(check: str):
    """Image bytes -> extension; BadImage for what the trainer could not use."""
    from pretrain.cli_verify import decode_image
    from pretrain.shards.images import image_extension
    from pretrain.views.decode import MAX_PIXELS

    def extension(data: bytes) -> str:
        return image_extension(data, max_pixels=MAX_PIXELS, decode=decode_image, always_decode=check == "decode")

    return extension


def _adopt(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import track

    from pretrain.shards.adopt import adopt, index_all
    from pretrain.shards.source import expand_shards

    if args.format not in (None, "webdataset"):
        raise UserError(f"--format {args.format} takes one INPUT that exists, not {' '.join(args.input)}")
    if args.holdout or args.limit:
        raise UserError("--holdout and --limit are for new shards: tars are taken as they are")
    shards = [shard.path for shard in expand_shards(args.input, trust_summary=False)]
    console = Console(stderr=True)
    indexes = list(track(index_all(shards), "indexing", total=len(shards), console=console, transient=True))
    folder = adopt(indexes, args.out)
    print(f"{folder}: {sum(map(len, indexes)):,} samples in {len(indexes)} shard(s), taken as they are")
    damaged = [index for index in indexes if index.damage]
    for index in damaged[:10]:
        print(f"  {index.path.name}: {len(index.damage)} problem(s), such as: {index.damage[0]}")
    if damaged:
        print(f"the rest of these {len(damaged)} shard(s) is used; all problems: python -m pretrain verify {folder}")
    return 0


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr; what it gives is called once a sample."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


@contextlib.contextmanager
def named_errors(out: Path) -> Iterator[None]:
    """What the disk refuses, told by its file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}; nothing was written") from error


def _print_skips(skips: list[Skip], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from pretrain.shards.pack import count_reasons

    if not skips:
        return
    table = Table("skipped", "number", "such as")
    for reason, number in count_reasons(skips).items():
        first = next(skip for skip in skips if skip.reason == reason)
        table.add_row(reason, str(number), f"{first.name} {first.detail}".strip()[:100])
    Console().print(table)
    print(f"all of them: {out / 'skipped.jsonl'}")
