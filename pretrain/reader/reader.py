"""Sample ids -> batches: the order says which samples, threads read, decode and crop them.

A batch is a pure function of (sources, order, seed, step, rank, world): every random number is keyed by the
sample and what it is for, so threads, prefetch and resuming change nothing, and `batch(step)` alone gives
what the stream gave. Threads in the rank's own process do the work (JPEG decode, resize and reads all release
the GIL); there are no worker processes to start, feed, or lose. At most `prefetch` batches are made ahead.

It makes uint8 pixels, token ids and the draws of photometric changes; these changes (`Batch.to`) and normalisation
run on the device.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pretrain.errors import UserError
from pretrain.order import Order
from pretrain.reader.assembly import Job, Plan
from pretrain.reader.batch import Batch
from pretrain.reader.blocks import BUDGET_BYTES, Blocks
from pretrain.reader.damage import DamageWatch
from pretrain.reader.fields import wanted_extensions
from pretrain.shards.source import Source
from pretrain.views.decode import MAX_PIXELS, Scratch
from pretrain.views.spec import ImageView, RegionView, TextView
from pretrain.views.text import Tokenizer

__all__ = ["Batch", "Reader"]


class Reader:
    """Batches of one rank, in the order's order. Close it, or use it in a `with`, to end its threads at once.

    `cache_bytes` bounds the encoded bytes kept between steps. `max_damaged` is the share of damaged rows the
    stream puts up with (of at least the first 1,000 rows); `on_damage` is called in the consumer's thread,
    once a damaged row, and once a malformed member that a good row goes without.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        order: Order,
        image_views: Sequence[ImageView],
        text_views: Sequence[TextView],
        tokenizer: Tokenizer | None,
        *,
        region_views: Sequence[RegionView] = (),
        seed: int,
        rank: int = 0,
        world: int = 1,
        threads: int = 2,
        prefetch: int = 2,
        max_damaged: float = 0.01,
        on_damage: Callable[[dict[str, Any]], None] | None = None,
        cache_bytes: int = BUDGET_BYTES,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        _check(image_views, text_views, region_views, tokenizer, threads, prefetch)
        wanted = wanted_extensions(image_views, text_views, region_views)
        self.blocks = Blocks(sources, order, wanted, world=world, budget=cache_bytes)
        self._plan = Plan(
            order,
            self.blocks,
            tuple(image_views),
            tuple(text_views),
            tuple(region_views),
            tokenizer,
            seed,
            rank,
            world,
            max_pixels,
            Scratch(),
        )
        self.order = order
        self._prefetch = prefetch
        self._damage = (max_damaged, on_damage)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")
        self._jobs: set[Job] = set()
        self._closed = False
        self._lock = threading.Lock()
        self._waited_s = 0.0

    def batch(self, step: int) -> Batch:
        """The batch of one step, the very one the stream gives; its damage is neither told nor counted."""
        return self._wait(self._start(step))

    def stream(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of steps start to stop - 1. Raises what a thread raised; UserError for too much damage.

        Work begins when the first batch is asked for. An iterator that is let go drops what it made ahead.
        """
        watch = DamageWatch(*self._damage)
        jobs: deque[Job] = deque()
        ahead = iter(range(start, stop))
        try:
            for _ in range(start, stop):
                while len(jobs) <= self._prefetch and (step := next(ahead, None)) is not None:
                    jobs.append(self._start(step))
                batch = self._wait(jobs.popleft())
                watch.show(batch)
                yield batch
        finally:
            for job in jobs:
                self._drop(job)

    def data_wait_s(self) -> float:
        """Seconds the consumer waited for batches since this was last asked; asking sets it back to 0."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def close(self) -> None:
        """End the threads; a consumer still waiting gets a RuntimeError. Closing twice is fine."""
        with self._lock:
            self._closed = True
        for job in list(self._jobs):
            self._drop(job)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, step: int) -> Job:
        with self._lock:  # no job begins that closing would not see
            if self._closed:
                raise RuntimeError("the reader was closed")
            job = Job(self._plan, self._pool, step)
            self._jobs.add(job)
            self._pool.submit(job.plan)
        return job

    def _wait(self, job: Job) -> Batch:
        begin = time.perf_counter()
        try:
            return job.done.result()
        finally:
            self._waited_s += time.perf_counter() - begin
            self._drop(job)

    def _drop(self, job: Job) -> None:
        self._jobs.discard(job)
        job.fail(RuntimeError("the reader was closed"))


def _check(image_views, text_views, region_views, tokenizer, threads: int, prefetch: int) -> None:
    names = [view.name for view in (*image_views, *text_views, *region_views)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two views are named {', '.join(twice)}: random numbers go by the name, so each needs its own")
    if missing := sorted({view.of for view in region_views} - {view.name for view in image_views}):
        raise UserError(f"regions are asked for in the image view {', '.join(missing)}, which no objective asks for")
    if text_views and tokenizer is None:
        raise UserError("an objective reads captions, but the recipe has model.text: null; give it a text tower")
    if threads < 1 or prefetch < 0:
        raise UserError(f"threads must be at least 1 and prefetch at least 0, got {threads} and {prefetch}")
