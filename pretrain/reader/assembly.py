"""One batch in the making: its rows dealt into tasks for threads, put together when the last task ends.

Every row is written to its own place of arrays made beforehand, so the order in which threads finish shows
nowhere. A damaged sample fails no batch: its row gets weight 0 and the pixels and caption of the next good
row. Any other error ends the batch and belongs to the consumer, with the sample's key and shard noted.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pretrain.order import Order
from pretrain.philox import uniforms
from pretrain.reader.batch import Batch
from pretrain.reader.blocks import Blocks, Sample
from pretrain.reader.fields import Fields
from pretrain.reader.samples import NO_LABEL, image_bytes, label
from pretrain.shards.roi import BOX
from pretrain.views.decode import DamagedSample, Scratch, decode
from pretrain.views.geometry import UNIFORMS, crop_box, random_resized_crop
from pretrain.views.photometric import draw
from pretrain.views.regions import Regions, in_crop
from pretrain.views.spec import ImageView, RegionView, TextView
from pretrain.views.text import Tokenizer

ROWS_A_TASK = 16


@dataclass(frozen=True)
class Plan:
    """What a job needs of its reader; not the reader itself, so that one that is let go is freed."""

    order: Order
    blocks: Blocks
    image_views: tuple[ImageView, ...]
    text_views: tuple[TextView, ...]
    region_views: tuple[RegionView, ...]
    tokenizer: Tokenizer | None
    seed: int
    rank: int
    world: int
    max_pixels: int
    scratch: Scratch

    def image_view(self, name: str) -> ImageView:
        return next(view for view in self.image_views if view.name == name)


class Job:
    """One batch in the making: `plan` deals its rows into tasks, the last task to end completes `done`."""

    def __init__(self, plan: Plan, pool: ThreadPoolExecutor, step: int) -> None:
        self.done: Future[Batch] = Future()
        self._of, self._pool, self._step = plan, pool, step
        self._lock = threading.Lock()

    def fail(self, error: BaseException) -> None:
        """End the job with an error, unless it has ended; its remaining tasks do nothing."""
        with self._lock:
            if not self.done.done():
                self.done.set_exception(error)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Errors belong to the consumer, not to the thread they happen in."""
        try:
            yield
        except BaseException as error:
            self.fail(error)

    def plan(self) -> None:
        """Ask the order, draw the random numbers, make room, and hand out the rows."""
        with self._failing():
            if self.done.done():
                return
            of = self._of
            self._rows = of.order.batch(self._step, of.rank, of.world)
            ids, source, epoch = self._rows
            draws = {view.name: UNIFORMS for view in of.image_views} | {view.purpose: 1 for view in of.text_views}
            self._u = {name: uniforms(of.seed, epoch, source, ids, name, n) for name, n in draws.items()}
            changed = [view for view in of.image_views if view.photometric]
            self._photometric = {view.name: draw(view, of.seed, epoch, source, ids) for view in changed}
            self._make_room(len(ids))
            tasks = _tasks(source, ids)
            self._left = len(tasks)
            for number, places in tasks:
                self._pool.submit(self._fill, number, places)

    def _make_room(self, rows: int) -> None:
        self._images = {v.name: np.empty((rows, 3, v.size, v.size), np.uint8) for v in self._of.image_views}
        self._captions = {v.name: [""] * rows for v in self._of.text_views}
        optional = [v.name for v in self._of.text_views if not v.required or v.after]
        optional += [v.name for v in self._of.region_views]
        self._present = {name: np.zeros(rows, bool) for name in optional}
        self._regions = {v.name: _no_regions(rows, v) for v in self._of.region_views}
        self._left_out: list[dict[str, str]] = [{}] * rows  # member -> what is wrong with it
        self._labels = np.full(rows, NO_LABEL, np.int64)
        self._reasons: list[str | None] = [None] * rows
        self._samples: list[Sample | None] = [None] * rows

    def _fill(self, source: int, places: np.ndarray) -> None:
        """Read and decode some rows of one source."""
        with self._failing():
            if self.done.done():
                return
            samples = self._of.blocks.read(source, self._rows.ids[places])
            for row, sample in zip(places.tolist(), samples):
                self._samples[row] = sample._replace(members={})  # the key and shard; the bytes may go
                if self.done.done():
                    return
                self._fill_row(row, sample)
            with self._lock:
                self._left -= 1
                last = self._left == 0
            if last:
                self._complete()

    def _fill_row(self, row: int, sample: Sample) -> None:
        fields = Fields(sample.members)
        try:
            if self._of.image_views:
                self._fill_images(row, sample, fields)
            for text in self._of.text_views:
                line = fields.text(text, float(self._u[text.purpose][row, 0]))
                self._captions[text.name][row] = line or ""
                if text.name in self._present:
                    self._present[text.name][row] = line is not None
            self._labels[row] = label(sample.members)
        except DamagedSample as damage:
            self._reasons[row] = damage.reason
        except Exception as error:
            error.add_note(f"sample {sample.key} of shard {sample.shard}, step {self._step}")
            raise
        self._left_out[row] = fields.left_out

    def _fill_images(self, row: int, sample: Sample, fields: Fields) -> None:
        pixels = decode(image_bytes(sample.members), max_pixels=self._of.max_pixels, scratch=self._of.scratch)
        for view in self._of.image_views:
            np.copyto(
                self._images[view.name][row],
                random_resized_crop(pixels, view, self._u[view.name][row]).numpy(),
            )
        for region_view in self._of.region_views:
            self._fill_regions(row, region_view, fields, pixels.shape[0], pixels.shape[1])

    def _fill_regions(self, row: int, view: RegionView, fields: Fields, height: int, width: int) -> None:
        boxes, features, mask = self._regions[view.name]
        if view.stored_dim is None:
            of, u = self._of.image_view(view.of), self._u[view.of][row]
            crop = crop_box(height, width, of, u)
            found = in_crop(fields.boxes(), height, width, crop, flipped=u[-1] < of.flip)[: view.most]
            boxes[row, : len(found)] = found
        else:
            found = fields.stored(view.stored_dim)[: view.most]
            features[row, : len(found)] = found
        mask[row, : len(found)] = True
        self._present[view.name][row] = len(found) > 0

    def _complete(self) -> None:
        good = np.array([reason is None for reason in self._reasons])
        self._fill_damaged(good)
        tokenizer = self._of.tokenizer
        ids, source, epoch = self._rows
        batch = Batch(
            step=self._step,
            ids=torch.from_numpy(ids),
            source=torch.from_numpy(source.astype(np.int64)),
            epoch=torch.from_numpy(epoch),
            keys=[sample.key for sample in self._samples if sample],
            weight=torch.from_numpy(good.astype(np.float32)),
            labels=torch.from_numpy(self._labels),
            images={name: torch.from_numpy(pixels) for name, pixels in self._images.items()},
            tokens={name: self._tokens(name, tokenizer) for name in self._captions} if tokenizer else {},
            captions=self._captions,
            damaged=self._damaged(),
            present={name: torch.from_numpy(rows) for name, rows in self._present.items()},
            regions={name: Regions(*map(torch.from_numpy, arrays)) for name, arrays in self._regions.items()},
            photometric=self._photometric,
        )
        with self._lock:
            if not self.done.done():
                self.done.set_result(batch)

    def _tokens(self, view: str, tokenizer: Tokenizer) -> torch.Tensor:
        tokens = tokenizer(self._captions[view])
        if view in self._present:
            tokens.numpy()[~self._present[view]] = 0
        return tokens

    def _fill_damaged(self, good: np.ndarray) -> None:
        """Damaged rows show the next good row, cyclically; black and empty where no row is good."""
        shown = np.arange(len(good))
        arrays = [*self._images.values(), *self._present.values(), *(a for r in self._regions.values() for a in r)]
        for row in np.flatnonzero(~good).tolist():
            after = np.roll(good, -row)
            stand_in = (row + int(after.argmax())) % len(good) if after.any() else None
            shown[row] = row if stand_in is None else stand_in
            for rows in arrays:
                rows[row] = 0 if stand_in is None else rows[stand_in]
            for texts in self._captions.values():
                texts[row] = "" if stand_in is None else texts[stand_in]
        self._photometric = {name: draws[shown] for name, draws in self._photometric.items()}

    def _damaged(self) -> list[dict[str, Any]]:
        """Damaged rows, and what was left out of good ones."""
        told = []
        for row, (sample, reason, left_out) in enumerate(zip(self._samples, self._reasons, self._left_out)):
            assert sample is not None
            known = {
                "step": self._step,
                "row": row,
                "source": int(self._rows.source[row]),
                "id": int(self._rows.ids[row]),
                "shard": str(sample.shard),
                "key": sample.key,
            }
            if reason is not None:
                told.append({**known, "reason": reason})
            else:
                told += [{**known, "reason": why, "left_out": member} for member, why in left_out.items()]
        return told


def _no_regions(rows: int, view: RegionView) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Room for boxes, features and mask, as in `Regions`."""
    columns = 0 if view.stored_dim is None else view.stored_dim + BOX
    shape = rows, view.most
    return np.zeros((*shape, 4), np.float32), np.zeros((*shape, columns), np.float16), np.zeros(shape, bool)


def _tasks(source: np.ndarray, ids: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Rows in the order in which they lie on disk, a source at a time, some to a task: (source, rows)."""
    tasks = []
    for number in np.unique(source).tolist():
        rows = np.flatnonzero(source == number)
        rows = rows[np.argsort(ids[rows], kind="stable")]
        tasks += [(number, rows[i : i + ROWS_A_TASK]) for i in range(0, len(rows), ROWS_A_TASK)]
    return tasks
