"""Reading samples from tars, CPU a sample: our index and block reads beside webdataset's raw iteration.

  python -m benchmarks.tar_reading [--images FOLDER] [--samples 1000] [--json PATH]

Two shards of jpg + txt + json, warm page cache, one thread, nothing decoded: what is compared is finding and
reading the bytes. The JPEGs are those of --images, else synthetic ones of about 40 kB. webdataset is given
its fastest form: no shuffle, no decode, no split. Ours:
  whole blocks   one pread a block of 256 consecutive samples, members sliced out of it
  random         one pread a sample, in random order
  parts, kept    pretrain.reader.blocks, which the trainer's reader calls, in the trainer's order with blocks of 256,
                 the order's own cost included: as it reads large sets, and sets whose blocks in use fit in
                 memory (here all of that memory is new, and its page faults are counted)
And building the index from headers beside `tarfile`.
"""

from __future__ import annotations

import io
import os
import random
import tarfile
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.common import measure, parser, report
from pretrain.order import SampleOrder
from pretrain.reader.blocks import BUDGET_BYTES, Blocks
from pretrain.shards.index import build_index
from pretrain.shards.source import Source, open_source

BLOCK = 256
WANTED = frozenset({"jpg", "txt"})
BAR = 8.0


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--images", type=Path, help="folder of JPEGs to read (default: synthetic)")
    p.add_argument("--samples", type=int, default=1000, help="samples a shard")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), images(args.images), args.samples)
        source = open_source(folder)
        title = f"{source.samples} samples of {mean_kb(source):.0f} kB, one thread, warm"
        found = tables(source, args.rounds)
    report(title, [{"what": what, **row} for what, rows in found.items() for row in rows], args)


def tables(source: Source, rounds: int) -> dict[str, list[dict]]:
    order = SampleOrder([source.lengths], seed=0, global_batch=BLOCK, block=BLOCK)
    peer = {"webdataset": lambda: read_webdataset(source)}
    places = {"whole blocks": lambda: read_blocks(source), "random": lambda: read_random(source)}
    reader = {
        "parts": lambda: read_as_trainer(source, order, budget=0),
        "kept": lambda: read_as_trainer(source, order, budget=BUDGET_BYTES),
    }
    building = {
        "tarfile": lambda: [names(path) for path in source.shards],
        "headers": lambda: [build_index(path) for path in source.shards],
    }
    # measured apart: what one way leaves of the heap would show in another's page faults
    return {
        "reading by index": rows(measure({**peer, **places}, rounds), source.samples, {"whole blocks": BAR}),
        "the reader's": rows(measure({**peer, **reader}, rounds), source.samples, {"parts": BAR}),
        "making the index": rows(measure(building, rounds), source.samples, {}),
    }


def names(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def rows(seconds: dict[str, float], samples: int, bars: dict[str, float]) -> list[dict]:
    """The first of `seconds` is the peer."""
    peer = next(iter(seconds.values()))
    return [
        {"way": name, "CPU us/sample": s / samples * 1e6, "ratio": peer / s, "bar": bars.get(name, "")}
        for name, s in seconds.items()
    ]


def read_webdataset(source: Source) -> int:
    import webdataset

    dataset = webdataset.WebDataset([str(path) for path in source.shards], shardshuffle=False)
    return sum(len(sample["jpg"]) + len(sample["txt"]) for sample in dataset)


def read_blocks(source: Source) -> int:
    total = 0
    for number, path in enumerate(source.shards):
        index = source.index(number)
        with open(path, "rb") as tar:
            for lo in range(0, len(index), BLOCK):
                total += sum(map(len, block_members(index, tar.fileno(), lo, min(lo + BLOCK, len(index)))))
    return total


def block_members(index, fd: int, lo: int, hi: int) -> list[memoryview]:
    start, stop = index.span(lo, hi)
    data = memoryview(os.pread(fd, stop - start, start))
    return [
        data[offset - start : offset - start + size]
        for parts in index.block(lo, hi)
        for extension, (offset, size) in parts.items()
        if extension in WANTED
    ]


def read_as_trainer(source: Source, order: SampleOrder, budget: int) -> int:
    blocks = Blocks([source], order, WANTED, budget=budget)
    total = 0
    for step in range(source.samples // BLOCK):
        for sample in blocks.read(0, order.batch(step).ids):
            total += sum(map(len, sample.members.values()))
    return total


def read_random(source: Source) -> int:
    shards, rows = source.locate(np.random.default_rng(0).permutation(source.samples))
    total = 0
    with ExitStack() as stack:
        fds = [stack.enter_context(open(path, "rb")).fileno() for path in source.shards]
        for shard, row in zip(shards.tolist(), rows.tolist()):
            total += sum(map(len, block_members(source.index(shard), fds[shard], row, row + 1)))
    return total


def mean_kb(source: Source) -> float:
    return sum(path.stat().st_size for path in source.shards) / source.samples / 1000


def images(folder: Path | None) -> list[bytes]:
    if folder:
        return [path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg")]
    draw = random.Random(0)
    return [draw.randbytes(40_000) for _ in range(20)]


def write_shards(folder: Path, photos: list[bytes], samples: int) -> None:
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(samples):
                parts = {
                    "jpg": photos[i % len(photos)],
                    "json": b'{"width": 500}' * 40,
                    "txt": b"a photo of a dog " * 4,
                }
                for extension, data in parts.items():
                    member = tarfile.TarInfo(f"{shard}{i:06d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main()
