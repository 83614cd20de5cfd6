"""A run's folder: the recipe it was started with, who may write into it, what it was started by.

RUN/recipe.yaml      resolved recipe          RUN/log.jsonl      a line a logged step
RUN/run.json         every start of it        RUN/damaged.jsonl  samples passed over, and why
RUN/checkpoints/     a folder a saved step    RUN/skips.json      data left out after a rewind
RUN/spikes.jsonl     losses that leapt, and   RUN/heartbeat/     where each rank is; stacks of one that hung
                     what their batch held    RUN/index.html     the run's page
RUN/profile/         traces that were wanted  RUN/oom/           what was held when memory ran out
RUN/tensorboard/, RUN/wandb/, RUN/wandb_id       RUN/run_id          the run's name among others
RUN/attempt          the start that may write into it, and none before; RUN/LOCK, which it holds (pretrain.fence)
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pretrain.durable import write_text
from pretrain.errors import UserError
from pretrain.fence import Fence, hold
from pretrain.recipe import Recipe, SegmentRecipe, dump_recipe, load_recipe

log = logging.getLogger(__name__)

FREE_TO_CHANGE = (
    "output", "world", "accumulation", "local_batch", "steps", "epochs", "log", "checkpoint", "backend", "sharding",
    "precision", "compute", "faults", "evaluate",
    "data.threads", "data.prefetch", "data.max_damaged", "data.segments", "optimizer.lr", "optimizer.clip_norm",
)  # fmt: skip
"""Keys a resumed run may set anew (each start's changes are in run.json): the order of data and the model stay."""


class RunFolder:
    """Paths of a run, and the rules for coming back to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self.starts_file = path / "run.json"
        self.log_file = path / "log.jsonl"
        self.damage_file = path / "damaged.jsonl"
        self.skips_file = path / "skips.json"
        self.checkpoints = path / "checkpoints"
        self.id_file = path / "run_id"
        self.fence: Fence | None = None
        """Of the start that this process is a rank of; None: it only reads."""

    def recipe(self) -> Recipe:
        """The recipe the run was last started with; UserError when this is no run folder."""
        if not self.recipe_file.is_file():
            raise UserError(f"{self.path} is not a run: it has no recipe.yaml")
        return load_recipe(self.recipe_file)

    def check(self, recipe: Recipe) -> list[str]:
        """Keys that changed since the run was last started; all may, while it has saved nothing.

        Raises:
            UserError: a key changed that makes it another run (see FREE_TO_CHANGE).
        """
        if not self.recipe_file.is_file():
            return []
        changed = _differences(self.recipe().model_dump(mode="json"), recipe.model_dump(mode="json"))
        refused = [line for key, line in changed.items() if not _free(key)]
        if refused and self._has_saved(recipe):
            shown = "\n  ".join(refused)
            raise UserError(
                f"{self.path} holds a run of another recipe:\n  {shown}\n"
                f"give it a folder of its own (output=…), or go back to the recipe in {self.recipe_file}"
            )
        return list(changed.values())

    def saves(self, recipe: Recipe) -> str | Path:
        """Where checkpoints of the run go."""
        from pretrain.checkpoint.store import absolute

        return absolute(recipe.checkpoint.to) if recipe.checkpoint.to else self.checkpoints

    def places(self, recipe: Recipe) -> list[str | Path]:
        """Where checkpoints of the run may be: where they go now, its own folder, and wherever else earlier starts have
        sent them, but for places that are another run's by now.

        Raises:
            UserError: an earlier place cannot be looked at, and may hold the newest checkpoint that the log tells of.
        """
        from pretrain.checkpoint import CheckpointError, owners
        from pretrain.checkpoint.layout import step_dirs

        places = list(dict.fromkeys([self.saves(recipe), self.checkpoints]))
        for to in dict.fromkeys(start["to"] for start in self.starts() if start.get("to") not in (None, *places)):
            try:
                if owners(to) <= {self.id()}:
                    places.append(to)
            except CheckpointError as error:
                saved, found = self.last_saved() or 0, max((s for p in places for s in step_dirs(p)), default=0)
                if saved > found and saved != recipe.checkpoint.lost:
                    raise UserError(
                        f"{self.path}: its log tells of a checkpoint of step {saved}, which may be in {to}, where an "
                        f"earlier start saved: {error}. If it is lost for good: checkpoint.lost={saved}"
                    ) from None
                log.warning("not looked for earlier checkpoints: %s", error)
        return places

    def _has_saved(self, recipe: Recipe) -> bool:
        from pretrain.checkpoint.layout import MANIFEST, step_dirs

        if self.last_saved() is not None:
            return True
        folders = (folder for place in self.places(recipe) for folder in step_dirs(place).values())
        return any(MANIFEST in folder.names() for folder in folders)

    def last_saved(self) -> int | None:
        """The step of the checkpoint that the run saved, or went on from, last by its log."""
        from pretrain.telemetry import read_events

        if not self.log_file.is_file():
            return None
        steps = [event["step"] for event in read_events(self.log_file) if event["event"] in ("save", "resume")]
        return steps[-1] if steps else None

    def replay_command(self, step: int) -> str:
        """What shows the step that the log calls `step`, as it can be typed."""
        from_nothing = " --advance" if step > 1 and self.last_saved() is None else ""
        return f"`polyview replay {self.path} --step {step}{from_nothing}`"

    def id(self) -> str | None:
        """What tells this run from all others."""
        try:
            return self.id_file.read_text().strip() or None
        except FileNotFoundError:
            return None

    def claim(self, recipe: Recipe) -> str:
        """The run's id, drawn at its first start; what `checkpoint.to` gives becomes its own place. Called by rank 0.

        Raises:
            UserError: that place is another run's, or cannot be written.
        """
        from pretrain.checkpoint import claim, new_attempt

        run = self.id() or new_attempt()
        try:
            self._write(self.id_file, f"{run}\n")
        except OSError as error:
            raise self._full(error) from None
        if recipe.checkpoint.to:
            claim(self.saves(recipe), run, {"output": str(self.path.absolute()), "host": platform.node()})
        return run

    def begin(self, recipe: Recipe, start: dict[str, Any]) -> None:
        """Keep the recipe and note this start, and where it sends its checkpoints; called by rank 0."""
        start = {**start, "to": str(self.saves(recipe))} if recipe.checkpoint.to else start
        try:
            self._write(self.starts_file, json.dumps([*self.starts(), start], indent=1) + "\n")
            self._write(self.recipe_file, dump_recipe(recipe))
        except OSError as error:
            raise self._full(error) from None

    def ended(self, how: str) -> None:
        """Note how the newest start ended, so that it is no crash: done, stopped by a signal, rewound, unevaluated, or
        refused, which any rank may note."""
        *before, newest = self.starts()
        try:
            self._write(self.starts_file, json.dumps([*before, {**newest, "ended": how}], indent=1) + "\n")
        except OSError as error:  # the disk is full: what was trained is saved
            log.warning("%s: that the run ended so, %s, is not noted (%s)", self.starts_file, how, error.strerror)

    def skips(self) -> list[SegmentRecipe]:
        """Stretches of data that rewinds have left out."""
        try:
            return [SegmentRecipe.model_validate(segment) for segment in json.loads(self.skips_file.read_text())]
        except FileNotFoundError:
            return []

    def add_skip(self, from_step: int, batches: int) -> None:
        """Leave out so many batches from 0-based `from_step` on; called by rank 0."""
        skips = [*self.skips(), SegmentRecipe(from_step=from_step, skip=batches)]
        try:
            self._write(self.skips_file, json.dumps([s.model_dump() for s in skips], indent=1) + "\n")
        except OSError as error:
            raise self._full(error) from None

    def with_skips(self, recipe: Recipe) -> Recipe:
        """`recipe` as this run follows it: without the data that rewinds have left out."""
        given, added = recipe.data.segments, self.skips()
        for segment in given:  # a recipe that has them already; two may be alike
            if segment in added:
                added.remove(segment)
        data = recipe.data.model_copy(update={"segments": [*given, *added]})
        return recipe.model_copy(update={"data": data}) if added else recipe

    def may_write(self) -> None:
        """Raise SupersededError where a later start has taken the run over: what is about to write asks this first."""
        if self.fence is not None:
            self.fence.check()

    def _write(self, file: Path, text: str) -> None:
        self.may_write()
        self._made()
        write_text(file, text, ready=self.may_write)

    def _made(self) -> Path:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output: {self.path} cannot be made a folder ({error.strerror}); choose another") from None
        return self.path

    def _full(self, error: OSError) -> UserError:
        return UserError(f"output: {self.path} cannot be written ({error.strerror}); make room there")

    def starts(self) -> list[dict[str, Any]]:
        """Every start so far, the newest last."""
        try:
            return json.loads(self.starts_file.read_text())
        except (FileNotFoundError, ValueError):
            return []

    @contextmanager
    def lock(self, attempt: str, wait_s: float = 0.0) -> Iterator[None]:
        """Hold the run for start `attempt`; called by rank 0. wait_s: see `pretrain.fence.hold`.

        Raises:
            UserError: another process trains into it, or the folder cannot be written.
        """
        with ExitStack() as held:
            try:
                held.enter_context(hold(self._made(), attempt, wait_s))
            except OSError as error:
                raise self._full(error) from None
            yield

    def note_damage(self, record: dict[str, Any]) -> None:
        """Append one sample that was passed over (a line is written whole: all ranks append to one file).

        Its step counts as the log and `replay` do: 1 is the first.
        """
        line = json.dumps(record | {"step": record["step"] + 1}) + "\n"
        self.may_write()
        try:
            with open(self.damage_file, "a") as handle:
                handle.write(line)
        except OSError as error:  # a full disk must not end the training for a line of its diary
            log.warning("%s: damaged sample not noted (%s): %s", self.damage_file, error.strerror, line.strip())


def _free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)


def _differences(old: Any, new: Any, key: str = "") -> dict[str, str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, str] = {}
        for name in dict.fromkeys([*old, *new]):
            found |= _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        return found
    return {} if old == new else {key: f"{key}: {old!r} -> {new!r}"}
