"""Plans carried out and judged: after the fault the same command must give what the undisturbed run gives."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.faults import settings
from benchmarks.faults.kinds import FAULTS, Wrong, expect, poison
from benchmarks.faults.runs import Run, differences, step_of
from benchmarks.faults.settings import BATCH, HANG_S, STEPS, Plan
from pretrain.checkpoint import Checkpoint
from pretrain.data import open_data
from pretrain.exit_codes import DONE
from pretrain.recipe import Recipe
from pretrain.shards.digits import write_digits

Verdict = dict[str, Any]


class Campaign:
    """Runs of one seed, kept in folder `work`: data, undisturbed runs, a verdict each; of failures everything."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work.resolve(), seed
        self.shards = self.work / "data" / "train"
        if not self.shards.exists():
            shutil.rmtree(self.work / "data", ignore_errors=True)
            write_digits(self.work / "data", train=settings.SAMPLES, test=1)

    def verdict(self, number: int) -> Verdict | None:
        """What came of run `number`, if it was done."""
        file = self._folder(number).with_suffix(".json")
        return json.loads(file.read_text()) if file.is_file() else None

    def carry_out(self, plan: Plan) -> Verdict:
        """Run, disturb, take up, judge; kept under its number."""
        folder, begin = self._folder(plan.number), time.monotonic()
        self._remove(plan.number)
        shown = {key: getattr(plan, key) for key in ("number", "kind", "backend", "world", "tower")}
        run = Run(self._recipe(plan, folder))
        hit, why = False, ""
        try:
            hit = self._disturb(plan, run)
        except Exception as error:  # whatever it is, it is the verdict, and the campaign goes on
            why = f"{type(error).__name__}: {error}" if not isinstance(error, Wrong) else str(error)
        verdict = {
            **shown, "seed": self.seed, "hit": hit, "whole": not why, "why": why, "codes": run.codes,
            "plan": {key: getattr(plan, key) for key in ("step", "delay_s", "saving", "rank")},
            "seconds": round(time.monotonic() - begin, 1),
        }  # fmt: skip
        if not why:
            self._remove(plan.number)
        folder.with_suffix(".json").write_text(json.dumps(verdict, indent=1) + "\n")
        return verdict

    def _disturb(self, plan: Plan, run: Run) -> bool:
        reference = None if plan.kind in ("nan-skip", "nan-rewind") else self._undisturbed(plan)
        if plan.poisoned:
            poison(run).touch()
        hit = FAULTS[plan.kind](plan, run)
        if plan.kind != "damage":  # there the newest was taken away on purpose
            lost = [step for step in run.logged_saves() if step > max(run.saved_steps(), default=0)]
            expect(not lost, f"checkpoints {lost} are in the log and not on the disk")
        if run.codes[-1] != DONE:
            code = run.finish()
            expect(code == DONE, f"taken up again, it ended with {code}: {run.told[-400:]}")
        found = run.saved()
        expect(found is not None and found.step == STEPS, "it is not at its last step")
        expected = reference or self._as_stated(plan, run)
        assert found is not None
        different = differences(expected, found)
        expect(not different, f"{len(different)} tensors differ from the undisturbed run, such as {different[:3]}")
        return hit

    def _recipe(self, plan: Plan, output: Path) -> Recipe:
        faults: dict[str, Any] = {"heartbeat_s": 0.5}
        changes: dict[str, Any] = {}
        if plan.kind == "hang":
            faults |= {"hang_s": HANG_S}
        if plan.kind == "reader":  # a copy of its own, to be cut short
            copy = output.with_suffix(".shards")
            shutil.copytree(self.shards, copy)
            changes["data"] = {"sources": [str(copy)]}
        if plan.poisoned:
            faults |= {"nan": plan.kind.removeprefix("nan-")}
            options = {"sample": self._sample_at(plan), "while_there": str(output.with_suffix(".poison"))}
            changes["objectives"] = {"tests.poison": options}
        return settings.recipe(plan, output, self.shards, faults=faults, **changes)

    def _sample_at(self, plan: Plan) -> int:
        """One of the samples of the plan's 0-based step."""
        _, order = open_data(settings.recipe(plan, self.work / "none", self.shards))
        return int(order.batch(plan.step).ids[plan.draw.randrange(BATCH)])

    def _undisturbed(self, plan: Plan) -> Checkpoint:
        """The last checkpoint of the same recipe left alone; trained once."""
        name = "-".join([plan.tower, plan.backend, str(plan.world), *["poison"] * plan.poisoned])
        changes: dict[str, Any] = {}
        if plan.poisoned:
            options = {"sample": 0, "while_there": str(self.work / "never")}
            changes["objectives"] = {"tests.poison": options}
        return _finished(Run(settings.recipe(plan, self.work / "undisturbed" / name, self.shards, **changes)))

    def _as_stated(self, plan: Plan, run: Run) -> Checkpoint:
        """The last checkpoint of the run that a policy states: without the step, or without the data."""
        other = run.folder.with_name(f"{run.folder.name}-stated")
        if plan.kind == "nan-rewind":
            skips = json.loads((run.folder / "skips.json").read_text())
            poison(run).unlink()
            data = run.recipe.data.model_dump() | {"segments": skips}
            return _finished(Run(_with(run.recipe, output=other, data=data)))
        every = {"every": 1, "keep_last": STEPS + 1}
        skipping = Run(_with(run.recipe, output=other, checkpoint=every))
        last = _finished(skipping)
        before, after = (step_of(skipping, step) for step in (plan.step, plan.step + 1))
        moved = differences(before, after)
        expect(not moved, f"step {plan.step + 1} was to be left out, and changed {moved[:3]}")
        return last

    def _folder(self, number: int) -> Path:
        return self.work / f"seed_{self.seed}" / f"run_{number:04d}"

    def _remove(self, number: int) -> None:
        folder = self._folder(number)
        for path in folder.parent.glob(f"{folder.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _finished(run: Run) -> Checkpoint:
    """The last checkpoint of a run that nothing disturbs."""
    found = run.saved()
    if found is None or found.step < STEPS:
        code = run.finish()
        expect(code == DONE, f"the undisturbed run ended with {code}: {run.told[-400:]}")
        found = run.saved()
    assert found is not None
    return found


def _with(recipe: Recipe, **changes: Any) -> Recipe:
    return Recipe.model_validate(recipe.model_dump() | changes)
