"""Every objective's loss as its paper writes it: plain autograd on the whole batch, in one process.

Heads, prototypes, gates and queues are the objective's own modules; everything after them is written out again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.distributed.groups import LOCAL
from pretrain.objectives.base import Features
from pretrain.objectives.clip import Clip
from pretrain.objectives.dino import Dino
from pretrain.objectives.functional.hydra import hydra_partners
from pretrain.objectives.functional.pyramid import CONTRASTS
from pretrain.objectives.hydra import Hydra
from pretrain.objectives.joint import Joint
from pretrain.objectives.moco import Moco
from pretrain.objectives.pyramid_clip import PyramidClip
from pretrain.objectives.siglip import Siglip
from pretrain.objectives.swav import Swav
from pretrain.reader import Batch


def textbook(joint: Joint, features: Features, batch: Batch) -> Tensor | None:
    """The joint loss of a whole batch, shape (), with a graph; None where an objective (a plug-in) has no formula here.

    Nothing is remembered: queues and centres are afterwards as they were.
    """
    if any(type(o) not in _FORMULAS for o in joint.by_name.values()):
        return None
    losses = [o.options.weight_at(batch.step) * _FORMULAS[type(o)](o, features, batch) for o in joint.by_name.values()]
    return torch.stack(losses).sum()


# ---- images and texts


def _infonce(image: Tensor, text: Tensor, o: Any, ids: Tensor, rows: Tensor, target: Callable) -> Tensor:
    """Symmetric cross-entropy over the rows that are there; rows of equal id are no candidates of each other."""
    image, text, ids = image[rows], text[rows], ids[rows]
    if not len(ids):
        return image.sum()
    candidates = (ids[:, None] != ids) | torch.eye(len(ids), dtype=torch.bool)
    on, off = target(candidates.sum(1).to(image.dtype))
    wanted = torch.where(candidates, off[:, None], 0.0).diagonal_scatter(on)
    logits = (o.logit_scale.exp() * image @ text.T, o.logit_scale.exp() * text @ image.T)
    log_p = [x.masked_fill(~candidates, -torch.inf).log_softmax(1).masked_fill(~candidates, 0.0) for x in logits]
    return -sum((wanted * x).sum() for x in log_p) / (2 * len(ids))


def _clip(o: Clip, features: Features, batch: Batch) -> Tensor:
    image, texts = o.unit(features)
    s = o.options.smoothing

    def target(count: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - s + s / count, s / count

    terms = [_infonce(image, t, o, batch.uid, w > 0, target) for t, w in zip(texts, o.weights(batch))]
    return torch.stack(terms).mean()


def _pyramid_clip(o: PyramidClip, features: Features, batch: Batch) -> Tensor:
    unit = {name: F.normalize(features[request], dim=-1) for name, request in o.asked.items()}
    alpha, total = o.options.softening, unit["global"].new_zeros(())

    def target(count: Tensor) -> tuple[Tensor, Tensor]:
        spread = alpha * (count > 1).to(count.dtype)
        return 1 - spread, spread / (count - 1).clamp(min=1)

    for image, text, part in CONTRASTS:
        if image in unit and text in unit:
            rows = batch.weight > 0
            for name in (image, text):
                rows = rows & batch.present.get(name, rows)
            total = total + o.options.weights[part] / 2 * _infonce(unit[image], unit[text], o, batch.uid, rows, target)
    return total


def _siglip(o: Siglip, features: Features, batch: Batch) -> Tensor:
    image, texts = o.unit(features)
    terms = []
    for text, weight in zip(texts, o.weights(batch)):
        rows = weight > 0
        logits, ids = o.logit_scale.exp() * image[rows] @ text[rows].T + o.logit_bias, batch.uid[rows]
        own = torch.eye(len(ids), dtype=torch.bool)
        counted = (ids[:, None] != ids) | own
        terms.append(-F.logsigmoid(torch.where(own, logits, -logits))[counted].sum() / len(ids))
    return torch.stack(terms).mean()


# ---- crops


def _sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The official code's order of operations."""
    q = torch.exp(scores / epsilon).T
    k, b = q.shape
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / k
        q = q / q.sum(dim=0, keepdim=True) / b
    return (q * b).T


def _swav(o: Swav, features: Features, batch: Batch) -> Tensor:
    options, rows = o.options, batch.weight > 0
    pooled = torch.cat([features[r] for r in o.requests()])
    scores = (F.normalize(o.head(pooled), dim=1) @ o.prototypes.T).chunk(len(o.requests()))
    losses = []
    for n, crop in enumerate(options.assign):
        assigned = scores[crop].detach()[rows]
        if o.queue is not None and o.queue.full(batch.step - options.queue_from_step):
            older = o.queue.rows(n)
            assigned = torch.cat([older[older.any(1)] @ o.prototypes.detach().T, assigned])
        q = _sinkhorn(assigned, options.epsilon, options.iterations)[-int(rows.sum()) :]
        others = [s for v, s in enumerate(scores) if v != crop]
        losses += [-(q * F.log_softmax(s[rows] / options.temperature, dim=1)).sum(1).mean() for s in others]
    return torch.stack(losses).mean()


def _moco(o: Moco, features: Features, batch: Batch) -> Tensor:
    rows, older = batch.weight > 0, o.queue.rows()
    q = F.normalize(o.head(features[o.query]), dim=1)[rows]
    k = F.normalize(o.key_head(features[o.key]), dim=1)[rows]
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ older[older.any(1)].T], dim=1)
    return F.cross_entropy(logits / o.options.temperature, torch.zeros(len(q), dtype=torch.int64))


def _dino(o: Dino, features: Features, batch: Batch) -> Tensor:
    options, rows = o.options, batch.weight > 0
    student = [o.head(features[r])[rows] for r in o.requests() if not r.teacher]
    taught = [o.teacher_head(features[r])[rows] for r in o.requests() if r.teacher]
    targets = [((t - o.center) / o.teacher_temperature(batch.step)).softmax(1) for t in taught]
    pairs = [(t, s) for i, t in enumerate(targets) for j, s in enumerate(student) if i != j]
    losses = [-(t * F.log_softmax(s / options.student_temperature, dim=1)).sum(1).mean() for t, s in pairs]
    return torch.stack(losses).mean()


def _hydra(o: Hydra, features: Features, batch: Batch) -> Tensor:
    """One anchor and one positive at a time."""
    options = o.options
    labels = torch.where(batch.weight > 0, batch.labels, -1)
    if o.clusters is not None:
        labels = o.clusters.assign(features[o.views[0]], batch.weight, LOCAL)
    partners = hydra_partners(
        labels, seed=o.facts.seed, step=batch.step, mode=options.partners, num_classes=o.classes, group=LOCAL
    )
    there = (labels >= 0) & (partners >= 0)
    labels, partners = labels[there], partners[there]
    z, k = (x[there] for x in o.projector(torch.cat([features[r] for r in o.views])).chunk(2))
    gates = torch.ones_like(z) if o.gates is None else o.gates(labels, partners)
    scale = 1 / options.temperature if o.logit_scale is None else o.logit_scale.exp()
    terms = []
    for anchor, gate, label, partner in zip(z, gates, labels, partners):
        logits = scale * _gated(anchor, k, gate, options.form)
        negative = (labels != label) & (labels != partner)
        terms += [torch.cat([x[None], logits[negative]]).logsumexp(0) - x for x in logits[labels == partner]]
    loss = torch.stack(terms).mean() if terms else z.sum() * 0
    return loss + options.gate_penalty * (4 * gates * (1 - gates)).mean()


def _gated(anchor: Tensor, keys: Tensor, gate: Tensor, form: str) -> Tensor:
    """(N,) similarities of one anchor with all keys."""
    if form == "gated_cosine":
        return F.cosine_similarity((gate * anchor)[None], gate * keys, dim=1)
    return (gate**2 * F.normalize(anchor, dim=0) * F.normalize(keys, dim=1)).sum(1)


_FORMULAS: dict[type, Callable[[Any, Features, Batch], Tensor]] = {
    Clip: _clip, Siglip: _siglip, PyramidClip: _pyramid_clip, Swav: _swav, Moco: _moco, Dino: _dino, Hydra: _hydra,
}  # fmt: skip
