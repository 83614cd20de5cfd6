"""Any step of any run again, on one machine: which samples, which crops, what loss each had.

The batch is exact, whatever the world was: order and augmentations are functions of (recipe, step). The losses are
those of the newest checkpoint at or before the step; `advance` trains from there up to the step, in one process.
"""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.checkpoint import Checkpoint, find_latest
from pretrain.data import open_data
from pretrain.distributed.process import Process
from pretrain.distributed.syncbn import frozen_statistics
from pretrain.errors import UserError
from pretrain.models.request import RegionInput
from pretrain.objectives.base import Features
from pretrain.optim.schedule import rates_at
from pretrain.parts import assemble
from pretrain.reader import Batch, Reader
from pretrain.recipe import Recipe, ShardingRecipe
from pretrain.run import RunFolder
from pretrain.step import seed_draws
from pretrain.telemetry import read_log
from pretrain.views.text import build_tokenizer


@dataclass
class Replayed:
    """One step of a run."""

    step: int
    weights_of: int
    """Steps done when the weights were as the losses show them; step - 1 for the step's own."""
    batch: Batch
    shards: list[str]
    """Shard of every row."""
    losses: dict[str, Tensor]
    """(B,) loss of every sample, by objective."""
    logged: float | None
    """The run's own figure for this step, where it was logged."""

    def total(self) -> Tensor:
        """(B,) sum over the objectives."""
        return torch.stack(list(self.losses.values())).sum(0)

    def summary(self, top: int) -> str:
        """A few lines for the terminal."""
        mean = self.total().sum() / self.batch.weight.sum().clamp(min=1)
        logged = "not logged" if self.logged is None else f"logged {self.logged:.6f}"
        lines = [
            f"step {self.step}: {len(self.batch.keys)} samples, mean loss {mean:.6f} "
            f"(weights after step {self.weights_of}; {logged})"
        ]
        for i in self.total().argsort(descending=True)[:top].tolist():
            lines.append(f"  {self.total()[i]:9.4f}  {self.shards[i]}  {self.batch.keys[i]}")
        return "\n".join(lines)


def replay(run: Path, step: int, *, advance: bool = False) -> Replayed:
    """Rebuild the step that the log calls `step`: 1 is a run's first.

    Raises:
        UserError: no run, a step outside of it, or no checkpoint at or before the step.
    """
    folder = RunFolder(run)
    recipe = folder.recipe()
    sources, order = open_data(recipe)
    total = recipe.total_steps(order.samples)
    if not 1 <= step <= total:
        raise UserError(f"step {step} is outside the run: it has steps 1 to {total}")
    index = step - 1  # what the order, the reader and the checkpoints count: steps done before this one
    places = folder.places(recipe)
    found = [saved for place in places if (saved := find_latest(place, at_most=index)) is not None]
    checkpoint = max(found, key=lambda saved: saved.step, default=None)
    if checkpoint is None and index and not advance:
        raise UserError(
            f"{', '.join(map(str, places))}: no checkpoint from before step {step}; "
            f"--advance trains up to it from nothing"
        )
    state = _State(recipe, order.samples, checkpoint)
    joint = state.parts.joint
    tokenizer = build_tokenizer(recipe.model.text)
    reader = Reader(
        sources, order, joint.image_views(recipe.model.image_size), joint.text_views(), tokenizer,
        region_views=joint.region_views(), seed=recipe.seed, threads=recipe.data.threads, max_damaged=1.0,
    )  # fmt: skip
    try:
        if advance:
            state.advance(reader, index, total)
        batch = reader.batch(index).to("cpu")
    finally:
        reader.close()
    shards = [str(sources[s].shards[int(sources[s].locate(i[None])[0][0])]) for s, i in zip(batch.source, batch.ids)]
    logged = next((line["loss"] for line in read_log(folder.log_file) if line["step"] == step), None)
    return Replayed(step, state.step, batch, shards, state.sample_losses(batch), logged)


class _State:
    """A run's weights in one process."""

    def __init__(self, recipe: Recipe, samples: int, checkpoint: Checkpoint | None) -> None:
        # one process on a CPU, whatever ran then
        compute = recipe.compute.model_copy(update={"attention": "auto", "compile": False})
        self.recipe = recipe = recipe.model_copy(
            update={"backend": "ddp", "sharding": ShardingRecipe(), "compute": compute}
        )
        self.world = checkpoint.meta["world"] if checkpoint else recipe.world or 1
        self.parts = assemble(recipe, samples, Process(0, 1, 0, torch.device("cpu")), checkpoint)
        self.step = checkpoint.step if checkpoint else 0

    def advance(self, reader: Reader, step: int, total: int) -> None:
        """Train up to `step`, on the same global batches."""
        for batch in reader.stream(self.step, step):
            self.parts.step(batch.to("cpu"), rates_at(batch.step, total, self.recipe))
            self.step = batch.step + 1

    @torch.no_grad()
    def sample_losses(self, batch: Batch) -> dict[str, Tensor]:
        """(B,) losses by objective, with the random draws each rank and micro-step had.

        With synchronised BatchNorm the ranks' rows go through together, and dropout draws are rank 0's.
        """
        backend, joint = self.parts.backend, self.parts.joint
        inputs = self.parts.two_stage.inputs(batch)
        features: Features = {}
        joint.before_step(batch.step)
        with frozen_statistics(backend.trunk), frozen_statistics(joint):
            for rank, micro, rows in self._forwards(len(batch)):
                seed_draws(self.recipe.seed, batch.step, rank, micro)
                taken = {r: x.take(rows) if isinstance(x, RegionInput) else x[rows] for r, x in inputs.items()}
                for r, feature in backend.forward(taken).items():
                    features.setdefault(r, feature.new_empty(len(batch), *feature.shape[1:]))[rows] = feature
            return joint.sample_losses(features, batch)

    def _forwards(self, batch: int) -> list[tuple[int, int, Tensor]]:
        """(rank, micro-step, rows) of every forward of the step."""
        rows = torch.arange(batch).view(self.world, self.recipe.accumulation, -1)
        has_norm = any(isinstance(m, _BatchNorm) and m.training for m in self.parts.backend.trunk.modules())
        if has_norm and self.recipe.model.sync_batchnorm:
            return [(0, m, rows[:, m].flatten()) for m in range(self.recipe.accumulation)]
        return [(r, m, rows[r, m]) for r in range(self.world) for m in range(self.recipe.accumulation)]


def write_page(replayed: Replayed, out: Path, top: int) -> None:
    """The step as one HTML file: crops as the towers saw them, highest loss first."""
    order = replayed.total().argsort(descending=True)[:top].tolist()
    cards = "\n".join(_card(replayed, i) for i in order)
    out.parent.mkdir(parents=True, exist_ok=True)
    summary = html.escape(replayed.summary(top=0))
    out.write_text(
        f"<!doctype html><meta charset=utf-8><title>step {replayed.step}</title><style>{_STYLE}</style>"
        f"<h1>Step {replayed.step}</h1><p>{summary}</p><p>{len(order)} of {len(replayed.batch.keys)} samples, "
        f"highest loss first; crops as the towers saw them.</p><main>{cards}</main>\n"
    )


_STYLE = """body{font:15px/1.4 system-ui,sans-serif;margin:2rem;background:#fff;color:#222}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:1rem}
figure{margin:0;overflow-wrap:anywhere}img{width:100%;image-rendering:pixelated;border-radius:4px}
b{font-variant-numeric:tabular-nums}small{color:#667}
@media(prefers-color-scheme:dark){body{background:#16181c;color:#ddd}small{color:#99a}}"""


def _card(replayed: Replayed, row: int) -> str:
    batch = replayed.batch
    crops = "".join(f'<img alt="" title="{html.escape(n)}" src="{_data_uri(v[row])}">' for n, v in batch.images.items())
    captions = "<br>".join(html.escape(texts[row]) for texts in batch.captions.values())
    losses = " ".join(f"{html.escape(n)} <b>{v[row]:.3f}</b>" for n, v in replayed.losses.items())
    damaged = "" if batch.weight[row] > 0 else " (damaged: weight 0)"
    where = html.escape(f"{Path(replayed.shards[row]).name} · {batch.keys[row]}{damaged}")
    return f"<figure>{crops}<figcaption>{losses}<br>{captions}<br><small>{where}</small></figcaption></figure>"


def _data_uri(pixels: Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
