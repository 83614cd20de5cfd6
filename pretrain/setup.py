"""A start of a run: from a recipe and what its folder holds to a `Trainer` that stands at the right step."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pretrain import crash_loop
from pretrain.check.fit import resolve_local_batch
from pretrain.checkpoint import Checkpoint, CheckpointWriter, forestall, newest_whole
from pretrain.checkpoint.layout import step_dirs
from pretrain.data import open_data
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.evaluation import live_evaluation
from pretrain.parts import assemble
from pretrain.reader import Reader
from pretrain.recipe import Recipe, check_split
from pretrain.run import RunFolder
from pretrain.telemetry import RunLog, provenance
from pretrain.telemetry.heartbeat import Heartbeat
from pretrain.trainer import Trainer
from pretrain.views.text import build_tokenizer

log = logging.getLogger(__name__)
T = TypeVar("T")


def set_up(
    recipe: Recipe, process: Process, folder: RunFolder, attempt: str, cleanup: ExitStack, raised: set[str | int]
) -> Trainer | None:
    """The trainer of this start; None where the run has done its last step.

    attempt: what names its checkpoint files. What must be closed or put back at the end is given to `cleanup`. raised:
    what signals have asked for so far, and their numbers.

    Raises:
        UserError: recipe, data, world or folder do not fit one another.
    """
    recipe = from_first(resolve_local_batch(recipe, process.world, process.device), process)
    try:
        check_split(recipe.global_batch, process.world, recipe.accumulation)
    except ValueError as error:
        raise UserError(str(error)) from None
    faults = recipe.faults
    heart = Heartbeat(
        folder.path, process=process, every_s=faults.heartbeat_s, hang_s=faults.hang_s, may_write=folder.may_write
    )
    cleanup.callback(heart.close)
    torch.use_deterministic_algorithms(recipe.deterministic)
    changed = folder.check(recipe)
    sources, order = open_data(recipe)
    total = recipe.total_steps(order.samples)
    run = by_first(lambda: _claim(recipe, folder, attempt), process)
    checkpoint = newest_saved(recipe, process, folder)
    start = checkpoint.step if checkpoint else 0
    if checkpoint is not None:
        order.check_continues(checkpoint.meta["order"], start)
    starts = from_first(folder.starts(), process)
    crash_loop.check(folder.path, starts, start, faults.max_crashes)
    if start > total or (start == total and starts and starts[-1].get("ended") == "done"):
        return None
    if process.first:
        if changed:
            log.info(f"{recipe.name}: changed since the last start: {'; '.join(changed)}")
        begun = {
            "from_step": start, "total_steps": total, "changed": changed, "world": process.world,
            "backend": recipe.backend,
        }  # fmt: skip
        folder.begin(recipe, {**provenance(), **begun})
    parts = assemble(recipe, order.samples, process, checkpoint)
    joint = parts.joint
    evaluation = live_evaluation(recipe, parts.backend)
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
        first = reader.batch(start).rows(0, micro).to(process.device)
        parts.backend.warm_up(parts.two_stage.inputs(first))
    writer = CheckpointWriter(
        folder.saves(recipe),
        rank=process.rank,
        world=process.world,
        attempt=attempt,
        run=run,
        keep_last=recipe.checkpoint.keep_last,
        keep_every=recipe.checkpoint.keep_every,
        may_write=folder.may_write,
    )
    cleanup.push(lambda kind, *_: _close(writer, kind))
    run_log = RunLog(
        folder.path,
        total_steps=total,
        resume_step=start or None,
        rank=process.rank,
        tensorboard=recipe.log.tensorboard,
        recipe=recipe,
        may_write=folder.may_write,
    )
    cleanup.callback(run_log.close)
    trainer = Trainer(
        recipe, process, folder, order, reader, parts, writer, run_log, heart, evaluation,
        start, total, raised,
        left_out=checkpoint.meta.get("left_out", 0) if checkpoint else 0,
    )  # fmt: skip
    cleanup.callback(trainer.profile.stop)
    cleanup.enter_context(trainer.listening())
    trainer.announce()
    return trainer


def _claim(recipe: Recipe, folder: RunFolder, attempt: str) -> str:
    """The run's id; from here on nothing that an earlier start has under way becomes one of its checkpoints."""
    run = folder.claim(recipe)
    forestall(folder.places(recipe), attempt)
    return run


def newest_saved(recipe: Recipe, process: Process, folder: RunFolder) -> Checkpoint | None:
    """The newest whole checkpoint of the run, wherever it has saved; None: it has saved none. By all ranks together.

    Raises:
        UserError: what it has saved is not there, not whole, or cannot be read.
    """
    places, saved = by_first(lambda: (folder.places(recipe), folder.last_saved()), process)
    newest = newest_whole(*places)
    if saved in (None, recipe.checkpoint.lost) or (newest is not None and newest.step >= saved):
        return newest
    if newest is not None and by_first(lambda: any(saved in step_dirs(place) for place in places), process):
        return newest  # the one saved last is there, and damaged
    older = f"to go on from step {newest.step}" if newest else "to begin anew in this folder, not in another output"
    raise UserError(
        f"{folder.path}: its log tells of a checkpoint of step {saved}, and there is none in "
        f"{', '.join(map(str, places))}. Put it back, or say in checkpoint.to where it is. If it is lost for good, "
        f"{older}: checkpoint.lost={saved}"
    )


def _close(writer: CheckpointWriter, error: type[BaseException] | None) -> None:
    """A save under way becomes whole also when the run ends in an error; a second Ctrl-C does not wait for it.

    The launcher's SIGTERM, because another rank has ended with the same error, does not cut it.
    """
    if error is not None and not issubclass(error, Exception):
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    writer.close()
    signal.signal(signal.SIGTERM, before)


def by_first(act: Callable[[], T], process: Process) -> T:
    """What `act` comes to on rank 0, be it an error that a person is meant to read, on all ranks."""
    done: Any = None
    if process.first:
        try:
            done = act()
        except UserError as error:
            done = error
    done = from_first(done, process)
    if isinstance(done, UserError):
        raise done
    return done


def from_first(value: Any, process: Process) -> Any:
    """What rank 0 has, on all ranks."""
    shared = [value]
    if process.world > 1:
        dist.broadcast_object_list(shared, src=0)
    return shared[0]
