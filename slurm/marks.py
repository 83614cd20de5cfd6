"""What of a pipeline is done: a mark for each stage, or element of an array, that its own job writes as its last act.

DIR/stages/NAME.json, of an array DIR/stages/NAME/PART-of-PARTS.json: {"argv", "inputs", "on", "stamp", "job", "host",
"time"}. Every end has a stamp of its own, and a mark holds the stamps of what its stage stood on: so whatever is done
again has all that follows done again. Training needs no mark: its run tells.
"""

from __future__ import annotations

import glob
import hashlib
import json
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.durable import write_text
from pretrain.errors import UserError
from pretrain.recipe import Recipe
from pretrain.run import RunFolder
from slurm.stages import TRAIN, TRAINED, Stage


@dataclass(frozen=True)
class Marks:
    """folder: DIR/stages. run: what is trained."""

    folder: Path
    run: Path

    def stamp(self, stage: Stage) -> str | None:
        """What this end of a stage is told from others by; None while it has not ended."""
        if stage.name == TRAIN:
            run = RunFolder(self.run)
            return f"{run.id()}-step_{saved:08d}" if (saved := run.last_saved()) else None
        read = [self.read(stage, part) for part in range(stage.parts)]
        stamps = [str(mark["stamp"]) for mark in read if mark]
        if len(stamps) < stage.parts:
            return None
        return stamps[0] if stage.parts == 1 else hashlib.sha256(" ".join(stamps).encode()).hexdigest()[:12]

    def stamps(self, needs: Sequence[Stage]) -> dict[str, str | None]:
        return {stage.name: self.stamp(stage) for stage in needs}

    def left(self, stage: Stage, needs: Sequence[Stage]) -> list[int]:
        """Parts of `stage` that are not done, or not by this command, or stood on something else; `needs` are done."""
        on = self.stamps(needs)
        if not glob.glob(named(stage.makes, on)):
            return list(range(stage.parts))
        wanted = {"argv": list(stage.argv), "inputs": stage.inputs, "on": on}
        read = [self.read(stage, part) or {} for part in range(stage.parts)]
        return [part for part, mark in enumerate(read) if any(mark.get(key) != wanted[key] for key in wanted)]

    def read(self, stage: Stage, part: int) -> dict[str, Any] | None:
        try:
            return json.loads(self._file(stage, part).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def write(self, stage: Stage, part: int, on: Mapping[str, str | None], job: str) -> None:
        file = self._file(stage, part)
        file.parent.mkdir(parents=True, exist_ok=True)
        mark = {"argv": list(stage.argv), "inputs": stage.inputs, "on": on, "stamp": secrets.token_hex(6), "job": job}
        write_text(file, json.dumps(mark | {"host": socket.gethostname(), "time": time.time()}, indent=1) + "\n")

    def _file(self, stage: Stage, part: int) -> Path:
        if stage.parts == 1:
            return self.folder / f"{stage.name}.json"
        return self.folder / stage.name / f"{part:05d}-of-{stage.parts:05d}.json"


def named(word: str, on: Mapping[str, str | None]) -> str:
    """A word of a command with the weights that it stands on."""
    return word.replace(TRAINED, on.get(TRAIN) or TRAINED)


def trained(recipe: Recipe) -> bool:
    """Whether the run of `recipe` has come to its end, and no more steps are asked of it."""
    run = RunFolder(recipe.output)
    starts = run.starts()
    if not starts or starts[-1].get("ended") != "done":
        return False
    if recipe.steps is not None:
        return (run.last_saved() or 0) >= recipe.steps
    try:
        return run.recipe().epochs == recipe.epochs
    except UserError:
        return False
