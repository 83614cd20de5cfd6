"""kNN, retrieval, zero-shot and RankMe of a run's weights while it goes on, over all its ranks.

The figures are those of `python -m downstream` on the checkpoint of that step: the same pixels, batches and formulas.
Towers run in the run's own precision (the commands in fp32: under bf16 figures differ in the third digit or so), scores
are counted in fp32. What is evaluated may be sharded, so every rank takes as many batches. 64 images a
batch, whatever the world and the micro-batch, so that a figure depends on neither; without a graph they
take less memory than a step.

Training goes on as if there had been no evaluation: modes of the modules and random generators are put back, and
nothing else is touched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from downstream import classification, knn, retrieval, scores
from downstream.features import Captions, Images, encode_texts, image_features, unit_rows
from downstream.live_sets import LiveSamples, open_sets
from downstream.weights import Output
from pretrain.backends import Backend
from pretrain.distributed.groups import cpu_group
from pretrain.errors import UserError
from pretrain.models.request import FeatureRequest, Input
from pretrain.recipe import Recipe
from pretrain.recipe.run import EvaluateRecipe
from pretrain.telemetry.signals import rankme
from pretrain.views.decode import decode
from pretrain.views.geometry import eval_crop
from pretrain.views.text import build_tokenizer

log = logging.getLogger(__name__)

PROTOCOL = knn.PROTOCOLS[0]
OUTPUTS: dict[str, set[Output]] = {
    "knn": {"pooled"},
    "retrieval": {"embedding"},
    "zeroshot": {"embedding"},
    "rankme": {"embedding", "pooled"},
}
"""What each task looks at."""


class Live:
    """See `pretrain.evaluation.LiveEvaluation`."""

    def __init__(self, recipe: Recipe, asked: EvaluateRecipe, backend: Backend) -> None:
        if asked.weights not in backend.weights():
            raise UserError("evaluate.weights: teacher: no objective of the recipe has a momentum teacher")
        self._tasks, self._backend = asked.tasks, backend
        self._group = cpu_group() if backend.process.world > 1 else None
        self._sets = open_sets(recipe, asked)
        self._towers = LiveTowers(recipe, asked, backend)
        self._outputs = [o for o in get_args(Output) if any(o in OUTPUTS[task] for task in asked.tasks)]
        if backend.process.first:
            for note in self._sets.notes:
                log.warning(f"evaluate: {note}")

    def run(self, step: int, beat: Callable[[], None], stop: Callable[[], bool]) -> dict[str, float] | None:
        begun = time.monotonic()
        self._towers.beat, self._towers.stop = beat, stop
        self.missed = False
        figures: Mapping[str, float | None] = {}
        try:
            with _aside(self._backend):
                figures = self._figures()
        except Stopped:
            return None
        except UserError as error:  # vectors that are not finite, images not to be read: the same on all ranks
            self.missed = True
            if self._backend.process.first:
                log.warning(f"step {step}: not evaluated: {error}")
        defined = {f"eval/{name}": value for name, value in figures.items() if value is not None}
        return defined | {"eval/seconds": time.monotonic() - begun}

    def _figures(self) -> dict[str, float | None]:
        features, whole = self._encode(self._sets.test, self._outputs)
        images = {o: Images(unit_rows(x), whole, self._sets.test.known) for o, x in features.items()}
        found: dict[str, float | None] = {}
        if "knn" in self._tasks:
            found |= self._knn(images["pooled"])
        if "retrieval" in self._tasks:
            found |= self._retrieval(images["embedding"])
        if "zeroshot" in self._tasks:
            found |= self._zeroshot(images["embedding"])
        if "rankme" in self._tasks:
            found |= {f"rankme/{o}": self._rankme(x[whole]) for o, x in features.items()}
        return found

    def _encode(self, samples: LiveSamples, outputs: Sequence[Output]) -> tuple[dict[Output, np.ndarray], np.ndarray]:
        """Features of all images on all ranks; UserError, on all alike, where one could not read its own."""
        try:
            found = image_features(self._towers, samples, outputs, decoder=samples.decoder)
        except UserError:
            self._check_read(samples)
            raise
        self._check_read(samples)
        return found

    def _check_read(self, samples: LiveSamples) -> None:
        told = [samples.failed]
        if self._backend.process.world > 1:
            told *= self._backend.process.world
            dist.all_gather_object(told, samples.failed, group=self._group)
        if any(told):
            raise UserError(f"{next(filter(None, told))}. The next evaluation, or the same command, reads it again")

    def _knn(self, queries: Images) -> dict[str, float | None]:
        train, test = self._sets.train, self._sets.test
        assert train is not None
        features, whole = self._encode(train, ["pooled"])
        bank = Images(unit_rows(features["pooled"]), whole, train.known)
        near = scores.neighbours(bank, queries, PROTOCOL.k, train.spec, test.spec, device=self._towers.device)
        return _accuracy("knn", near.answers(PROTOCOL))

    def _retrieval(self, images: Images) -> dict[str, float | None]:
        written = self._sets.captions
        assert written is not None
        captions = Captions(**vars(written), vectors=encode_texts(self._towers, written.texts))
        found = scores.retrieve(images, captions, self._sets.test.spec, device=self._towers.device)
        return {name.replace("@", "_"): value for name, value in retrieval.metrics(found.ranks).items()}

    def _zeroshot(self, images: Images) -> dict[str, float | None]:
        prompts = encode_texts(self._towers, self._sets.prompts)
        return _accuracy("zeroshot", scores.name(images, prompts, self._sets.classes).answers)

    def _rankme(self, features: np.ndarray) -> float:
        return rankme(torch.from_numpy(features).to(self._towers.device).double())


class Stopped(Exception):
    """A signal has reached a rank; raised on all of them at the same batch."""


class LiveTowers:
    """The weights that are evaluated, where they lie; see `downstream.weights.Towers`."""

    def __init__(self, recipe: Recipe, asked: EvaluateRecipe, backend: Backend) -> None:
        self.name = f"evaluate (weights: {asked.weights})"
        self.device = backend.process.device
        self.image_size = recipe.model.image_size
        self.has_text = recipe.model.text is not None
        self._resize = recipe.model.eval_resize
        self._which, self._backend = asked.weights, backend
        reads = {"retrieval", "zeroshot"} & set(asked.tasks)
        self._tokenizer = build_tokenizer(recipe.model.text) if reads else None
        self.beat: Callable[[], None] = lambda: None
        self.stop: Callable[[], bool] = lambda: False

    def preprocess(self, image: bytes) -> Tensor:
        return eval_crop(decode(image), self.image_size, resize=self._resize)

    def image_features(self, images: Tensor, outputs: Sequence[Output]) -> dict[Output, Tensor]:
        requests: dict[Output, FeatureRequest] = {o: FeatureRequest("image", "image", o) for o in outputs}
        found = self._forward(dict.fromkeys(requests.values(), images.to(self.device)))
        return {output: found[request] for output, request in requests.items()}

    def text_vectors(self, texts: list[str]) -> Tensor:
        assert self._tokenizer is not None
        request = FeatureRequest("text", "text")
        return F.normalize(self._forward({request: self._tokenizer(texts).to(self.device)})[request], dim=-1)

    def _forward(self, inputs: Mapping[FeatureRequest, Input]) -> dict[FeatureRequest, Tensor]:
        self.beat()
        if self.stop():
            raise Stopped
        return self._backend.forward(inputs, of=self._which)


@contextmanager
def _aside(backend: Backend) -> Iterator[None]:
    """Within: the trunk in evaluation mode and no graph; afterwards its modes and torch's generators are as before."""
    training = [(module, module.training) for module in backend.trunk.modules()]
    devices = [backend.process.device] if backend.process.device.type == "cuda" else []
    backend.trunk.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode


def _accuracy(task: str, answers: classification.Answers) -> dict[str, float | None]:
    found = classification.metrics(answers)
    return {f"{task}_top1": found["acc1"], f"{task}_top5": found["acc5"]}
