"""What the loop of `pretrain.train` works with: the run's parts, and what is logged, saved and said of it."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from pretrain.checkpoint import CheckpointError, CheckpointWriter
from pretrain.distributed.collectives import all_gather_rows
from pretrain.distributed.flags import SharedFlags
from pretrain.distributed.process import Process
from pretrain.distributed.syncbn import SyncBatchNorm
from pretrain.errors import UserError
from pretrain.evaluation import LiveEvaluation
from pretrain.exit_codes import NOT_FINITE
from pretrain.models.request import FeatureRequest
from pretrain.objectives.base import Features
from pretrain.optim.schedule import rates_at
from pretrain.order import Order
from pretrain.parts import Parts
from pretrain.reader import Batch, Reader
from pretrain.recipe import Recipe
from pretrain.run import RunFolder
from pretrain.step import NonFiniteError, StepResult
from pretrain.telemetry import RunLog, RunPage, StepClock, embedding_std, rankme, read_log
from pretrain.telemetry.heartbeat import Heartbeat
from pretrain.telemetry.phases import Phases
from pretrain.telemetry.profiler import ProfileWindow
from pretrain.telemetry.spikes import Spikes, note_spike
from pretrain.telemetry.straggler import OwnClock, Stragglers

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Ask for a save and an end: Slurm's warnings, submitit's, a terminal's."""


class Rewind(Exception):
    """A step is not finite, and the recipe says to go back; raised by all ranks at that 0-based `step`."""

    def __init__(self, step: int, error: NonFiniteError) -> None:
        super().__init__(f"step {step + 1}: {error}")
        self.step = step


@dataclass
class Trainer:
    """One start of a run, on one rank."""

    recipe: Recipe
    process: Process
    folder: RunFolder
    order: Order
    reader: Reader
    parts: Parts
    writer: CheckpointWriter
    log: RunLog
    heart: Heartbeat
    evaluation: LiveEvaluation | None
    start: int
    total: int
    raised: set[str | int] = field(default_factory=set)
    """What signals, and wishes from outside, have asked for; and the signals' numbers."""
    warned: set[str] = field(default_factory=set)
    logged_save: int | None = None
    saved_and_stopped: bool = False
    left_out: int = 0
    """Steps of the run that were not finite, up to here; kept in its checkpoints."""

    def __post_init__(self) -> None:
        faults, device = self.recipe.faults, self.process.device
        self.flags = SharedFlags(("stop", "profile"), self.process.world)
        self.profile = ProfileWindow(self.folder.path, self.process, self.folder.may_write)
        self.phases = Phases(device)
        self.clock = StepClock(
            self.start, self.recipe.global_batch,
            phases=self.phases, device=device, precision=self.recipe.precision, world=self.process.world,
        )  # fmt: skip
        self.stragglers = Stragglers(self.process, faults.straggler)
        self.own = OwnClock(device)
        self.first_collective = "forward" if _meets_in_forward(self.recipe, self.parts.backend.trunk) else "loss"
        self._step, self.waited_s = self.start, 0.0
        self.page = RunPage(self.folder.path, may_write=self.folder.may_write) if self.process.first else None
        self.spikes = Spikes(faults.spike, faults.spike_window) if faults.spike and self.process.first else None
        self.parts.two_stage.mark = self._at

    # ---- a step

    def batches(self) -> Iterator[Batch]:
        """This rank's batches, from where the run stands to its end."""
        self.at(self.start, "data")
        for batch in self.reader.stream(self.start, self.total):
            self.at(batch.step, "transfer")
            self.own.begin()
            yield batch
            self.at(batch.step + 1, "data")

    def at(self, step: int, phase: str) -> None:
        """The run is at `phase` of 0-based `step`: for whoever looks at it, and for the log."""
        self._step = step
        self._at(phase)

    def _at(self, phase: str) -> None:
        self.phases.mark(phase)
        self.heart.at(self._step, phase)
        if phase == self.first_collective:
            data_s = self.reader.data_wait_s()
            self.waited_s += data_s
            self.stragglers.add(data_s + self.own.end(), data_s)

    def step(self, batch: Batch) -> StepResult:
        """Train on one batch; where that is not finite, do as the recipe says.

        Raises:
            UserError, Rewind: not finite, on all ranks alike.
        """
        try:
            result = self.parts.step(batch.to(self.process.device), rates_at(batch.step, self.total, self.recipe))
        except NonFiniteError as error:
            self.log.event("non-finite", step=batch.step + 1)
            raise self._refused(batch.step, error) from None
        if result.grad_norm is None:
            self._note_left_out(batch.step, result.overflowed)
        elif self.spikes and (figures := self.spikes.seen(result.loss.item())):
            whole = self.order.batch(batch.step)
            self.log.event("spike", step=batch.step + 1, **figures)  # first: it asks whether this start may still write
            note_spike(self.folder.path, batch.step + 1, figures, whole.source, whole.ids)
        return result

    def _refused(self, step: int, error: NonFiniteError) -> Exception:
        """What is raised instead of a NaN: what a person can do about it, or the way back."""
        if self.recipe.faults.nan == "rewind":
            with suppress(CheckpointError):  # it is to go back to the save under way, not to the one before
                self.writer.wait(self._beat)
            return Rewind(step, error)
        return UserError(
            f"step {step + 1}: {error}. No weight was touched. "
            f"{self.folder.replay_command(step + 1)} shows the batch and the loss of each sample; "
            f"lower optimizer.lr or set optimizer.clip_norm; the same command resumes from the newest checkpoint. "
            f"faults.nan=skip leaves such steps out, faults.nan=rewind goes back and on without the data",
            exit_code=NOT_FINITE,
        )

    def _note_left_out(self, step: int, overflowed: bool) -> None:
        self.log.event("overflow" if overflowed else "left-out", step=step + 1)
        if overflowed:
            return  # fp16 finding its scale
        most = self.recipe.faults.max_nan
        if self.left_out == most:
            raise UserError(
                f"step {step + 1} is not finite, and faults.max_nan={most} steps of this run were left out already: "
                f"the weights may have gone astray before. Lower optimizer.lr or set optimizer.clip_norm, and go on "
                f"from a checkpoint before the first of them, or give a larger faults.max_nan",
                exit_code=NOT_FINITE,
            )
        self.left_out += 1
        if self.process.first:
            log.warning(f"step {step + 1} is not finite: left out ({self.left_out} of at most {most})")

    # ---- log

    def log_step(self, done: int, result: StepResult, evaluated: Mapping[str, float], *, signals: bool) -> None:
        """A line of the log; called by all ranks."""
        self.at(done - 1, "log")
        rates = rates_at(done - 1, self.total, self.recipe)
        line: dict[str, Any] = {"samples_seen": done * self.recipe.global_batch, "epoch": self.order.epoch_of(done)}
        line |= {"loss": result.loss, **result.figures, "lr": rates.lr, "grad_norm": result.grad_norm}
        if self.parts.step.loss_scale.enabled:
            line["loss_scale"] = self.parts.step.loss_scale.value
        if signals:
            line |= _embedding_signals(result.features)
        waited_s, self.waited_s = self.waited_s, 0.0
        self.log.step(done, line | dict(evaluated) | self.clock.read(done, waited_s))
        self.warn(done - 1, result.figures)
        if self.page and done % self.recipe.log.page_every == 0:
            self.page.write()
        if self.process.first and (report := self.stragglers.read()) and report.line:
            log.warning(f"step {done}: {report.line}")
            self.log.event("straggler", step=done, message=report.line)

    def warn(self, step: int, figures: Mapping[str, Tensor | float]) -> None:
        """Say once what the objectives' figures warn of, and note it in the log."""
        if not self.process.first:
            return
        for line in self.parts.joint.warnings({name: float(figure) for name, figure in figures.items()}, step):
            if line not in self.warned:
                self.warned.add(line)
                log.warning(f"step {step + 1}: {line}")
                self.log.event("warning", step=step + 1, message=line)

    # ---- save and end

    def save(self, step: int) -> None:
        """Hand step's state to the writer; training waits for the copy, and for the save before on every rank."""
        self.at(step - 1, "save")
        meta = {
            "recipe": self.recipe.model_dump(mode="json"),
            "order": self.order.description(),
            "samples_seen": step * self.recipe.global_batch,
            "world": self.process.world,
            "backend": self.parts.backend.describe(),
            "left_out": self.left_out,
        }
        try:
            self.writer.wait(self._beat)
        except CheckpointError as error:
            log.warning(f"{error}; trying again at step {step}")
            self.log.event("save-failed", step=step)
        self.flags.meet(self._beat)  # the first rank waits for the commit too, the others would look as if they hung
        self.writer.save(step, self.parts.fragments(), meta)

    def _beat(self) -> None:
        """A sign of life while a save is waited for."""
        self.heart.at(self._step, "save")

    def log_save(self) -> None:
        """Note the newest checkpoint once it is whole."""
        if self.writer.committed != self.logged_save:
            self.logged_save = self.writer.committed
            self.log.event("save", step=self.logged_save)
            if self.page:
                self.page.write()

    def evaluate(self, done: int) -> dict[str, float] | None:
        """Figures of the weights after `done` steps; None where a signal came in between."""
        if self.evaluation is None:
            return {}
        self.at(done - 1, "evaluate")
        beat = partial(self.heart.at, done - 1, "evaluate")
        figures = self.evaluation.run(done, beat, self._stopping)
        if figures and self.process.first:
            log.info(f"step {done}: " + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
        return figures

    def _stopping(self) -> bool:
        return "stop" in self.flags.exchange(self.raised)

    def agreed(self) -> set[str]:
        """The flags that any rank had raised when this was last called; asked by all ranks together, who all get the
        same answer."""
        if self.profile.wanted():
            self.raised.add("profile")
        agreed = self.flags.exchange(self.raised)
        self.raised -= agreed - {"stop"}
        return agreed

    def complete(self) -> bool:
        """Do what an earlier start left undone that ended behind its last save: evaluate, and end.

        False when a signal came in between.
        """
        evaluated = self.evaluate(self.total)
        if evaluated and self.process.first:
            seen = {"samples_seen": self.total * self.recipe.global_batch, "epoch": self.order.epoch_of(self.total)}
            logged = [line for line in read_log(self.folder.path) if line["step"] == self.total]
            self.log.step(self.total, seen | (logged[-1] if logged else {}) | evaluated)
        self.finish(stopped=evaluated is None)
        return evaluated is not None

    def finish(self, stopped: bool) -> None:
        """Wait for the last save; say how to go on if the run was stopped."""
        self.writer.wait(self._beat)
        self.flags.meet(self._beat)  # no rank leaves before the checkpoint is whole
        self.log_save()
        self.saved_and_stopped = stopped
        self.log.event("stop" if stopped else "end")
        if self.page:  # the first rank
            missed = self.evaluation is not None and self.evaluation.missed
            self.folder.ended("stopped" if stopped else "unevaluated" if missed else "done")
            self.page.write(now=True)
        if self.page and stopped:
            log.warning("stopped by a signal and saved; the same command goes on from there")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within: a signal asks for a save and an end, instead of ending the process."""

        def ask(number: int, _frame: object) -> None:
            if "stop" in self.raised and number == signal.SIGINT:
                raise KeyboardInterrupt  # the second Ctrl-C does not wait for the save
            self.raised |= {"stop", number}

        before = {int(number): signal.signal(number, ask) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        for number in sorted(before.keys() & self.raised - {signal.SIGINT}):
            if self.saved_and_stopped and callable(handler := before[number]):
                handler(number, None)  # a job's, which has it put back into the queue: now there is a checkpoint

    def announce(self) -> None:
        """A line on what begins."""
        if not self.process.first:
            return
        begun = f"resuming at step {self.start} of" if self.start else "training"
        log.info(
            f"{self.recipe.name}: {begun} {self.total} steps, {self.order.samples:,} samples, "
            f"batch {self.recipe.global_batch}, {self.parts.parameters / 1e6:.1f} M parameters, "
            f"{self.parts.backend.describe()}, into {self.folder.path}"
            + (f", checkpoints into {self.folder.saves(self.recipe)}" if self.recipe.checkpoint.to else "")
        )


def _meets_in_forward(recipe: Recipe, trunk: nn.Module) -> bool:
    """Whether ranks wait for one another within a forward: what is measured behind that is not one rank's own."""
    return recipe.backend in ("fsdp2", "zero3") or any(isinstance(m, SyncBatchNorm) for m in trunk.modules())


def _embedding_signals(features: Features) -> dict[str, float]:
    """RankMe and spread of the image features of the global batch; gathered from all ranks, on all ranks.

    Of the embedding and of the pooled features, each in the first view that gives it.
    """
    found: dict[str, float] = {}
    for request, name in _first_views(features).items():
        rows = all_gather_rows(features[request])
        found |= {f"rankme/{name}": rankme(rows), f"embedding_std/{name}": embedding_std(rows)}
    return found


def _first_views(features: Features) -> dict[FeatureRequest, str]:
    """The image features that signals are read from, and what they are called."""
    found: dict[str, FeatureRequest] = {}
    for request in features:
        whole = request.from_layer is None and request.output in ("embedding", "pooled")
        if request.tower == "image" and whole and not request.teacher:
            found.setdefault(request.output, request)
    return {r: r.view if output == "embedding" else f"{r.view}.{output}" for output, r in found.items()}
