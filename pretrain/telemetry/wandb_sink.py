"""The run's numbers in Weights & Biases, beside its own log; a resumed run goes on in the same place.

Its id is kept in RUN/wandb_id. Nothing that goes wrong there ends the training: one warning, and no more is sent.
"""

from __future__ import annotations

import logging
import os
import secrets
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.recipe import Recipe
from pretrain.recipe.run import WandbRecipe

log = logging.getLogger(__name__)

ID_FILE = "wandb_id"


class WandbSink:
    """Sends to the W&B run of the run in `folder`.

    Raises:
        UserError: wandb is not installed, or nobody is logged in.
    """

    def __init__(self, folder: Path, settings: WandbRecipe, recipe: Recipe) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb
        except ImportError:
            raise UserError("log.wandb: wandb is not installed; pip install wandb, or leave log.wandb out") from None
        self._wandb = wandb
        self._run: Any = None
        if settings.mode == "online" and not wandb.login(prompt=False):
            raise UserError(
                "log.wandb: nobody is logged in to W&B; run `wandb login`, set WANDB_API_KEY, or log.wandb.mode=offline"
            )
        self._try("begin", self._begin, folder, settings, recipe)

    def step(self, step: int, numbers: Mapping[str, Any]) -> None:
        """The numbers of a logged step, under its own "step": steps that a resume overtook may come again."""
        if self._run is not None:
            figures = {name: v for name, v in numbers.items() if isinstance(v, (int, float))}
            self._try("go on", self._run.log, {"step": step, **figures})

    def close(self) -> None:
        """Send what is left, and end W&B's process."""
        if self._run is not None:
            run, self._run = self._run, None
            self._try("end", run.finish)
        self._try("end", self._wandb.teardown)

    def _begin(self, folder: Path, settings: WandbRecipe, recipe: Recipe) -> None:
        run = self._wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            id=_run_id(folder),
            resume="allow" if settings.mode == "online" else None,  # offline the id alone does it, at the sync
            name=recipe.name,
            dir=folder,
            config=recipe.model_dump(mode="json"),
            settings=self._wandb.Settings(silent=True, console="off"),
        )
        run.define_metric("*", step_metric="step")
        self._run = run

    def _try(self, what: str, call: Any, *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:  # network, disk, quota, its own process gone: whatever it is, training goes on
            log.warning(f"W&B could not {what} ({error}); it gets no more until the next start")
            self._run = None


def _run_id(folder: Path) -> str:
    """The id in RUN/wandb_id, made at the first start."""
    file = folder / ID_FILE
    if not file.exists():
        alphabet = string.ascii_lowercase + string.digits
        made = "".join(secrets.choice(alphabet) for _ in range(8))
        aside = file.with_name(f".{ID_FILE}")
        aside.write_text(made + "\n")
        os.replace(aside, file)
    return file.read_text().strip()
