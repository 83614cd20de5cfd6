"""The training loop, visible in one function.

Everything that must be equal after a resume is a function of the step (order of data, augmentations, learning rate,
random draws) or is in the checkpoint (weights, optimizer and objective state): so a run that was killed anywhere
goes on as if it had not been.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.backends import Backend
from pretrain.backends.replicated import Replicated
from pretrain.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointWriter,
    Fragment,
    find_latest,
    new_attempt,
    open_checkpoint,
    step_dir,
)
from pretrain.data import open_data
from pretrain.distributed.collectives import all_gather_rows
from pretrain.distributed.flags import SharedFlags
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.models.request import FeatureRequest
from pretrain.objectives.base import Features
from pretrain.objectives.joint import Joint
from pretrain.optim.schedule import rates_at
from pretrain.order import Order
from pretrain.parts import assemble
from pretrain.reader import Reader
from pretrain.recipe import Recipe, check_split
from pretrain.run import RunFolder
from pretrain.step import NonFiniteError, TwoStage, update
from pretrain.telemetry import RunLog, StepClock, embedding_std, provenance, rankme
from pretrain.views.text import build_tokenizer

log = logging.getLogger(__name__)


def train(recipe: Recipe, process: Process) -> bool:
    """Train `recipe` to its last step, from the newest whole checkpoint of its folder if there is one.

    False when a signal stopped it before: it has saved, and the same call goes on from there.

    Raises:
        UserError: the recipe, the data or the folder do not fit; the loss became NaN; the disk is full.
    """
    folder = RunFolder(recipe.output)
    with folder.lock() if process.first else nullcontext(), ExitStack() as cleanup:
        run = _setup(recipe, process, folder, cleanup)
        if run is not None:
            return _loop(run)
        if process.first:
            log.info(f"{recipe.name}: already trained to its last step; more of them (steps=…) would go on from there")
        return True


def _loop(run: _Run) -> bool:
    recipe, process = run.recipe, run.process
    last = stop = False
    clock = StepClock(run.start, recipe.global_batch)
    for batch in run.reader.stream(run.start, run.total):
        # ---- features, loss, gradients
        run.joint.before_step(batch.step)
        batch = batch.to(process.device)
        result = run.two_stage(batch)

        # ---- reduce, clip, step
        rates = rates_at(batch.step, run.total, recipe)
        with run.explained(batch.step):
            grad_norm = update(
                run.backend, run.replicated, run.joint, result,
                step=batch.step, rates=rates, clip_norm=recipe.optimizer.clip_norm,
            )  # fmt: skip

        # ---- log
        done = batch.step + 1
        last = done == run.total
        if done == run.start + 1:
            run.writer.reserve(run.fragments())  # host memory for the first save, now that all state exists
        run.log_save()
        signals = last or done % recipe.log.signals_every == 0
        if signals or done % recipe.log.every == 0 or done == run.start + 1:
            line: dict[str, Any] = {"samples_seen": done * recipe.global_batch, "epoch": run.order.epoch_of(done)}
            line |= {"loss": result.loss, **result.figures, "lr": rates.lr, "grad_norm": grad_norm}
            if signals:
                line |= run.embedding_signals(result.features)
            run.log.step(done, line | clock.read(done, run.reader.data_wait_s()))
            run.warn(batch.step, result.figures)

        # ---- save; a signal that reached any rank stops all of them here, at the same step
        stop = "stop" in run.flags.exchange(run.raised)
        if last or stop or done % recipe.checkpoint.every == 0:
            run.save(done)
        if stop:
            break
    run.finish(stop and not last)
    return last


@dataclass
class _Run:
    """What the loop works with."""

    recipe: Recipe
    process: Process
    folder: RunFolder
    order: Order
    reader: Reader
    joint: Joint
    backend: Backend
    replicated: Replicated
    two_stage: TwoStage
    writer: CheckpointWriter
    log: RunLog
    flags: SharedFlags
    start: int
    total: int
    raised: set[str] = field(default_factory=set)
    warned: set[str] = field(default_factory=set)
    logged_save: int | None = None

    def save(self, step: int) -> None:
        """Hand step's state to the writer; training waits for the copy only."""
        meta = {
            "recipe": self.recipe.model_dump(mode="json"),
            "order": self.order.description(),
            "samples_seen": step * self.recipe.global_batch,
            "world": self.process.world,
            "backend": self.backend.describe(),
        }
        try:
            self.writer.wait()
        except CheckpointError as error:
            log.warning(f"{error}; trying again at step {step}")
            self.log.event("save-failed", step=step)
        self.writer.save(step, self.fragments(), meta)

    def log_save(self) -> None:
        """Note the newest checkpoint once it is whole."""
        if self.writer.committed != self.logged_save:
            self.logged_save = self.writer.committed
            self.log.event("save", step=self.logged_save)

    def fragments(self) -> list[Fragment]:
        """All that this rank writes of the run's state."""
        return self.backend.fragments() + self.replicated.fragments()

    def embedding_signals(self, features: Features) -> dict[str, float]:
        """RankMe and spread of the image features of the global batch; gathered from all ranks, on all ranks.

        Of the embedding and of the pooled features, each in the first view that gives it.
        """
        found: dict[str, float] = {}
        for request, name in _first_views(features).items():
            rows = all_gather_rows(features[request])
            found |= {f"rankme/{name}": rankme(rows), f"embedding_std/{name}": embedding_std(rows)}
        return found

    def warn(self, step: int, figures: Mapping[str, Tensor | float]) -> None:
        """Say once what the objectives' figures warn of, and note it in the log."""
        if not self.process.first:
            return
        for line in self.joint.warnings({name: float(figure) for name, figure in figures.items()}, step):
            if line not in self.warned:
                self.warned.add(line)
                log.warning(f"step {step + 1}: {line}")
                self.log.event("warning", step=step + 1, message=line)

    @contextmanager
    def explained(self, step: int) -> Iterator[None]:
        """Turn a NaN into what a person can do about it."""
        try:
            yield
        except NonFiniteError as error:
            self.log.event("non-finite", step=step + 1)
            raise UserError(
                f"step {step + 1}: {error}. No weight was touched. "
                f"`polyview replay {self.folder.path} --step {step + 1}` shows the batch and the loss of each sample; "
                f"lower optimizer.lr or set optimizer.clip_norm; the same command resumes from the newest checkpoint"
            ) from None

    def finish(self, stopped: bool) -> None:
        """Wait for the last save; say how to go on if the run was stopped."""
        self.writer.wait()
        if self.process.world > 1:
            dist.barrier()  # no rank leaves before the checkpoint is whole
        self.log_save()
        self.log.event("stop" if stopped else "end")
        if stopped and self.process.first:
            log.warning("stopped by a signal and saved; the same command goes on from there")


def _first_views(features: Features) -> dict[FeatureRequest, str]:
    """The image features that signals are read from, and what they are called."""
    found: dict[str, FeatureRequest] = {}
    for request in features:
        whole = request.from_layer is None and request.output in ("embedding", "pooled")
        if request.tower == "image" and whole and not request.teacher:
            found.setdefault(request.output, request)
    return {r: r.view if output == "embedding" else f"{r.view}.{output}" for output, r in found.items()}


def _setup(recipe: Recipe, process: Process, folder: RunFolder, cleanup: ExitStack) -> _Run | None:
    try:
        check_split(recipe.global_batch, process.world, recipe.accumulation)
    except ValueError as error:
        raise UserError(str(error)) from None
    torch.use_deterministic_algorithms(recipe.deterministic)
    changed = folder.check(recipe)
    sources, order = open_data(recipe)
    total = recipe.total_steps(order.samples)

    checkpoint = _newest(folder, process, order)
    start = checkpoint.step if checkpoint else 0
    parts = assemble(recipe, order.samples, process, checkpoint)
    joint, backend, two_stage = parts.joint, parts.backend, parts.two_stage
    if start >= total:
        return None
    reader = Reader(
        sources,
        order,
        joint.image_views(recipe.model.image_size),
        joint.text_views(),
        build_tokenizer(recipe.model.text),
        region_views=joint.region_views(),
        seed=recipe.seed,
        rank=process.rank,
        world=process.world,
        threads=recipe.data.threads,
        prefetch=recipe.data.prefetch,
        max_damaged=recipe.data.max_damaged,
        on_damage=folder.note_damage,
    )
    cleanup.callback(reader.close)
    if process.world > 1:
        micro = recipe.global_batch // (process.world * recipe.accumulation)
        backend.warm_up(two_stage.inputs(reader.batch(start).rows(0, micro).to(process.device)))
    if process.first:
        folder.begin(recipe, {**provenance(), "from_step": start, "changed": changed, "world": process.world})
    writer = CheckpointWriter(
        folder.checkpoints,
        rank=process.rank,
        world=process.world,
        attempt=_from_first(new_attempt(), process),
        keep_last=recipe.checkpoint.keep_last,
        keep_every=recipe.checkpoint.keep_every,
    )
    # a save under way becomes whole also when the run ends in an error; a second Ctrl-C does not wait for it
    cleanup.push(lambda kind, *_: writer.close() if kind is None or issubclass(kind, Exception) else None)
    run_log = RunLog(
        folder.path,
        total_steps=total,
        resume_step=start or None,
        rank=process.rank,
        tensorboard=recipe.log.tensorboard,
    )
    cleanup.callback(run_log.close)
    run = _Run(
        recipe, process, folder, order, reader, joint, backend, parts.replicated, two_stage, writer, run_log,
        SharedFlags(("stop",), process.world), start, total,
    )  # fmt: skip
    _listen(run, cleanup)
    _announce(run)
    return run


def _newest(folder: RunFolder, process: Process, order: Order) -> Checkpoint | None:
    # rank 0 checks every byte and tells the others which one it is: all load the same, or none
    step = None
    if process.first:
        newest = find_latest(folder.checkpoints, verify=True)
        step = newest.step if newest else None
    step = _from_first(step, process)
    if step is None:
        return None
    checkpoint = open_checkpoint(step_dir(folder.checkpoints, step))
    order.check_continues(checkpoint.meta["order"], checkpoint.step)
    return checkpoint


def _from_first(value: Any, process: Process) -> Any:
    """What rank 0 has, on all ranks."""
    shared = [value]
    if process.world > 1:
        dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _listen(run: _Run, cleanup: ExitStack) -> None:
    def raise_stop(number: int, _frame: object) -> None:
        if "stop" in run.raised and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the save
        run.raised.add("stop")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        cleanup.callback(signal.signal, number, signal.signal(number, raise_stop))


def _announce(run: _Run) -> None:
    if not run.process.first:
        return
    begun = f"resuming at step {run.start} of" if run.start else "training"
    trained = sum(p.numel() for p in run.backend.trunk.parameters())
    log.info(
        f"{run.recipe.name}: {begun} {run.total} steps, {run.order.samples:,} samples, "
        f"batch {run.recipe.global_batch}, {trained / 1e6:.1f} M parameters, {run.backend.describe()}, "
        f"into {run.folder.path}"
    )
