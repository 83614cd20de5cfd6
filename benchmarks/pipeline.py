"""Tars to batches of pixels and tokens, CPU an image: our reader beside open_clip's pipeline.

  POLYVIEW_DATA=... python -m benchmarks.pipeline [--images 500] [--rounds 5] [--json PATH]

Both read the same shards of jpg + txt once, from a warm page cache. open_clip's own `get_wds_dataset` does
not run on webdataset 1.0 (it was written for 0.2), so the same pieces are put together here in the same
order: shard list, tar samples, shuffle buffer, "pilrgb" decode, training transform, SimpleTokenizer, batches;
in this process, without a DataLoader, whose pickling and worker start would only add to it. Ours: `Reader`
with one and two threads, caption and byte caches emptied before every round, so that nothing comes from an
earlier epoch.

CPU counts all threads. Wall-clock is printed for the gain of the second thread; on a shared machine trust the
CPU.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import webdataset as wds
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import image_transform

from benchmarks.common import parser, report
from benchmarks.photographs import SETS, captions, photographs, write_tars
from pretrain.order import SampleOrder
from pretrain.reader import Reader
from pretrain.shards.source import open_source
from pretrain.views.spec import ImageView, TextView
from pretrain.views.tokenizer import ClipTokenizer

BAR = 0.4
BATCH = 50


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--images", type=int, default=500, help="photographs of each set, at most")
    args = p.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in SETS:
        images = photographs(name, args.images // BATCH * BATCH)
        with tempfile.TemporaryDirectory() as folder:
            shards = write_tars(Path(folder), images, captions(name))
            rows += compare(name, shards, len(images), args.rounds)
    report("tars -> batches of 224-pixel crops and tokens", rows, args)


def compare(name: str, shards: list[Path], images: int, rounds: int) -> list[dict]:
    peer, tokenizer = Peer(shards), ClipTokenizer()
    runs = {
        "open_clip": peer.epoch,
        "ours, 1 thread": lambda: read_epoch(shards, tokenizer, 1),
        "ours, 2 threads": lambda: read_epoch(shards, tokenizer, 2),
    }
    cpu, wall = measure_both(runs, rounds)
    return [
        {
            "set": name,
            "what": what,
            "CPU ms an image": cpu[what] / images * 1e3,
            "CPU, share of open_clip's": cpu[what] / cpu["open_clip"],
            "bar": "" if what == "open_clip" else BAR,
            "wall ms an image": wall[what] / images * 1e3,
        }
        for what in runs
    ]


class Peer:
    """open_clip's training pipeline, one epoch at a time."""

    def __init__(self, shards: list[Path]) -> None:
        transform, tokenizer = image_transform(224, is_train=True), SimpleTokenizer()
        self.pipeline = wds.DataPipeline(
            wds.SimpleShardList([str(shard) for shard in shards]),
            wds.tarfile_to_samples(),
            wds.shuffle(5000, initial=1000),
            wds.decode("pilrgb"),
            wds.rename(image="jpg;png;jpeg;webp", text="txt"),
            wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
            wds.to_tuple("image", "text"),
            wds.batched(BATCH, partial=False),
        )

    def epoch(self) -> int:
        return sum(len(images) for images, _ in self.pipeline)


def read_epoch(shards: list[Path], tokenizer: ClipTokenizer, threads: int) -> int:
    tokenizer._caption.cache_clear()  # the words stay, as open_clip's do
    source = open_source([str(shard) for shard in shards])
    order = SampleOrder([source.lengths], seed=0, global_batch=BATCH)
    views = [ImageView("image", 224)], [TextView()]
    with Reader([source], order, *views, tokenizer, seed=0, threads=threads) as reader:
        return sum(len(batch) for batch in reader.stream(0, source.samples // BATCH))


def measure_both(runs: dict[str, Callable[[], int]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median CPU and wall seconds of each run, rounds in turn after a warm-up of each; all must read the
    same.
    """
    counts = {what: run() for what, run in runs.items()}
    if len(set(counts.values())) != 1:
        raise SystemExit(f"the pipelines read different numbers of images: {counts}")
    cpu: dict[str, list[float]] = {what: [] for what in runs}
    wall: dict[str, list[float]] = {what: [] for what in runs}
    for _ in range(rounds):
        for what, run in runs.items():
            start = time.process_time(), time.perf_counter()
            run()
            cpu[what].append(time.process_time() - start[0])
            wall[what].append(time.perf_counter() - start[1])
    return _medians(cpu), _medians(wall)


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {what: statistics.median(s) for what, s in seconds.items()}


if __name__ == "__main__":
    main()
