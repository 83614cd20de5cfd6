"""The training loop, visible in one function.

Everything that must be equal after a resume is a function of the step (order of data, augmentations, learning rate,
random draws) or is in the checkpoint (weights, optimizer and objective state): so a run that was killed anywhere
goes on as if it had not been.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist

from pretrain.checkpoint import new_attempt
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.exit_codes import FINAL, NOT_FINITE
from pretrain.fence import Fence
from pretrain.flops import step_flops
from pretrain.oom import memory_explained
from pretrain.recipe import Recipe
from pretrain.run import RunFolder
from pretrain.setup import by_first, newest_saved, set_up
from pretrain.telemetry.garbage import collected_together
from pretrain.trainer import Rewind, Trainer

log = logging.getLogger(__name__)

LEAVING = 3
"""Times `faults.heartbeat_s` that an earlier attempt of the same Slurm job has to see that it is over, and to leave."""


def train(recipe: Recipe, process: Process) -> bool:
    """Train `recipe` to its last step, from the newest whole checkpoint of its folder if there is one.

    False when a signal stopped it before: it has saved, and the same call goes on from there.

    Raises:
        UserError: the recipe, the data or the folder do not fit; the loss became NaN; the disk is full; a later start
            has taken the run over.
    """
    folder = RunFolder(recipe.output)
    raised: set[str | int] = set()  # a signal that comes as a run goes back is not forgotten
    with ExitStack() as held:
        attempt = by_first(lambda: _take_hold(folder, recipe, held), process)
        folder.fence = Fence(folder.path, attempt)
        rewinds = 0
        while True:
            name = f"{attempt}r{rewinds}" if rewinds else attempt
            try:
                return _start(folder.with_skips(recipe), process, folder, name, raised)
            except Rewind as rewind:
                rewinds += 1
                with _refusal_noted(folder):
                    _leave_out(folder, rewind, recipe, process)
            gc.collect()  # the model that was, before the next is built beside it
            torch.cuda.empty_cache()


def _take_hold(folder: RunFolder, recipe: Recipe, held: ExitStack) -> str:
    """The name of this start, which from here on is the only one that writes into the run."""
    attempt = new_attempt()
    held.enter_context(folder.lock(attempt, LEAVING * recipe.faults.heartbeat_s))
    return attempt


def _start(recipe: Recipe, process: Process, folder: RunFolder, attempt: str, raised: set[str | int]) -> bool:
    before = len(folder.starts())
    explained = memory_explained(recipe, process, folder.path, folder.may_write)
    with ExitStack() as cleanup, _refusal_noted(folder, before), explained:
        run = set_up(recipe, process, folder, attempt, cleanup, raised)
        if run is not None:
            return _loop(run, cleanup.enter_context(collected_together()))
    if process.first:
        log.info(f"{recipe.name}: already trained to its last step; more of them (steps=…) would go on from there")
    return True


@contextmanager
def _refusal_noted(folder: RunFolder, before: int = 0) -> Iterator[None]:
    """Within: what a person must put right first, or broke off, is noted: it is no crash (`pretrain.crash_loop`).

    By whichever rank met it, since the others only lose that one; of a start that has begun, when there were `before`.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        if len(folder.starts()) > before and (isinstance(error, KeyboardInterrupt) or error.exit_code in FINAL):
            folder.ended("refused")
        raise


def _loop(run: Trainer, collect: Callable[[int], None]) -> bool:
    if run.start == run.total:  # killed behind its last save
        return run.complete()
    recipe = run.recipe
    evaluated: dict[str, float] | None
    last = stop = False
    for batch in run.batches():
        # ---- features, loss, gradients, update
        result = run.step(batch)
        done = batch.step + 1
        first, last = done == run.start + 1, done == run.total

        # ---- save; training waits for the copy, and for the save before
        if first:
            if run.process.first:  # who logs
                run.clock.needs(step_flops(recipe, run.order.samples, batch))
            run.writer.reserve(run.parts.fragments())  # host memory for the first save, now that all state exists
        if last or _due(done, recipe.checkpoint.every):
            run.save(done)
        run.log_save()

        # ---- evaluate, log
        evaluated = run.evaluate(done) if last or _due(done, recipe.evaluate.every if recipe.evaluate else 0) else {}
        signals = last or _due(done, recipe.log.signals_every)
        if first or signals or evaluated or _due(done, recipe.log.every):
            run.log_step(done, result, evaluated or {}, signals=signals)

        # ---- what reached any rank (a signal, a wish for a profile) takes effect on all of them here
        agreed = run.agreed()
        stop = "stop" in agreed
        if stop:
            run.save(done)
            break
        run.profile.step()
        if "profile" in agreed:
            run.profile.start(done)
        collect(done)
    stopped = stop and (not last or evaluated is None)
    run.finish(stopped)
    return not stopped


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _leave_out(folder: RunFolder, rewind: Rewind, recipe: Recipe, process: Process) -> None:
    """Note that the data from the newest checkpoint to the step that broke is not to be seen again."""
    most = recipe.faults.max_nan
    if len(folder.skips()) >= most:
        raise UserError(
            f"{rewind}. Rewound faults.max_nan={most} times already; lower optimizer.lr or set optimizer.clip_norm, "
            f"or look at the data: {folder.replay_command(rewind.step + 1)}",
            exit_code=NOT_FINITE,
        )
    newest = newest_saved(recipe, process, folder)  # the very one that the next start will find
    begin = newest.step if newest else 0
    if process.first:
        batches = rewind.step + 1 - begin
        log.warning(f"{rewind}: back to step {begin}, and on without {batches} batches")
        folder.add_skip(begin, batches)
        folder.ended("rewound")
    if process.world > 1:
        dist.barrier()  # the others read what the first has written
