"""What a Hydra run's gates say of its classes: which are alike, and which pairs share most of their dimensions.

Relation of two classes: the cosine of their own gates g(c, c), the mean gate taken off, for all gates have much in
common. Openness of a pair: Σ g(a, b), how many dimensions it is compared in. Both in evaluation mode. Pairs are
streamed in blocks and only the best are kept: 1,000 classes have 500,500 pairs of 256 numbers.

The relations are the gates' own. Whether they agree with a taxonomy is not scored here.
"""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from downstream.evaluate import Evaluation
from downstream.results import Result
from downstream.weights import Weights
from pretrain.objectives.pieces.gates import Gates

MOST_CELLS = 200  # a side of the picture; beyond, a cell is the mean over several classes
MOST_ORDERED = 2000  # classes that hierarchical clustering sorts; more stay in the order of their numbers
ROWS = 256  # of relations at a time


class Best:
    """The `top` pairs of the highest score among all that were offered."""

    def __init__(self, top: int) -> None:
        self.top = top
        self._heap: list[tuple[float, int, int]] = []

    def offer(self, scores: Tensor, first: Tensor, second: Tensor) -> None:
        """Pairs (first, second) and their scores, all (n,)."""
        best = scores.topk(min(self.top, len(scores)))
        chosen = zip(best.values.tolist(), first[best.indices].tolist(), second[best.indices].tolist())
        for entry in chosen:
            if len(self._heap) < self.top:
                heapq.heappush(self._heap, entry)
            else:
                heapq.heappushpop(self._heap, entry)

    def pairs(self) -> list[tuple[int, int, float]]:
        """(class, class, score), highest first."""
        return [(a, b, score) for score, a, b in sorted(self._heap, key=lambda e: (-e[0], *e[1:]))]


def unit_gates(gates: Gates) -> Tensor:
    """(C, D) single-class gates less their mean, of unit length: relations are their products. Zeros if all are one."""
    own = gates.classes()
    centred = own - own.mean(0)
    # differences within rounding are none
    noise = 10 * torch.finfo(own.dtype).eps * own.norm(dim=1, keepdim=True)
    return torch.where(centred.norm(dim=1, keepdim=True) > noise, F.normalize(centred, dim=1), 0)


def most_related(unit: Tensor, top: int) -> list[tuple[int, int, float]]:
    """The `top` pairs a < b of the highest relation; `unit` as `unit_gates` gives it."""
    best, everyone = Best(top), torch.arange(len(unit), device=unit.device)
    for rows in everyone.split(ROWS):
        a, b = (rows[:, None] < everyone[None]).nonzero().unbind(1)
        if len(a):
            best.offer((unit[rows] @ unit.T)[a, b], rows[a], b)
    return best.pairs()


def openness(gates: Gates, top: int) -> tuple[dict[str, float], dict[str, list[tuple[int, int, float]]]]:
    """(mean share of open dimensions of a class with itself and of two classes, mean entropy;
    the pairs of two classes that are most and least open, Σ g).
    """
    most, least = Best(top), Best(top)
    same = different = entropy = 0.0
    for a, b, g in gates.pairs():
        opened, own = g.sum(1), a == b
        same, different = same + float(opened[own].sum()), different + float(opened[~own].sum())
        entropy += float((torch.special.entr(g) + torch.special.entr(1 - g)).sum())
        if not own.all():
            most.offer(opened[~own], a[~own], b[~own])
            least.offer(-opened[~own], a[~own], b[~own])
    classes, total = gates.size, gates.size * (gates.size + 1) // 2
    figures = {
        "openness_own": same / (classes * gates.dim),
        "openness_pairs": different / (max(total - classes, 1) * gates.dim),
        "gate_entropy": entropy / (total * gates.dim),
    }
    return figures, {"open": most.pairs(), "closed": [(a, b, -s) for a, b, s in least.pairs()]}


def spread(unit: Tensor) -> float:
    """Root mean square relation of two classes: 0 where all classes have one gate."""
    classes = len(unit)
    squares = (unit.double().T @ unit.double()).square().sum() - unit.double().square().sum(1).square().sum()
    return float((squares.clamp(min=0) / max(classes * (classes - 1), 1)).sqrt())


def order(unit: Tensor) -> np.ndarray:
    """(C,) the classes so that related ones stand together, by average linkage."""
    if not 2 < len(unit) <= MOST_ORDERED or not unit.any():
        return np.arange(len(unit))
    from scipy.cluster.hierarchy import leaves_list, linkage

    return leaves_list(linkage(unit.cpu().numpy().astype(np.float64), "average"))


def matrix(unit: Tensor, places: np.ndarray) -> tuple[np.ndarray, int]:
    """((n, n) relations in the order `places`, how many classes a row holds).

    Beyond 200 classes a cell is the mean over a block of pairs, which is the product of the blocks' mean vectors.
    """
    per_cell = -(-len(unit) // MOST_CELLS)
    sorted_unit = unit[torch.from_numpy(places.copy()).to(unit.device)]
    means = torch.stack([part.mean(0) for part in sorted_unit.split(per_cell)])
    return (means @ means.T).cpu().numpy(), per_cell


def as_png(relations: np.ndarray) -> str:
    """The matrix as a picture's data URI: -1 is red, 0 white, 1 blue."""
    x = np.clip(relations, -1, 1)[..., None]
    low, high = np.array([195, 61, 53]), np.array([36, 89, 201])
    colours = 255 - np.abs(x) * (255 - np.where(x > 0, high, low))
    out = io.BytesIO()
    Image.fromarray(colours.round().astype(np.uint8)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def evaluate_relations(weights: Weights, gates: Gates, names: Sequence[str], *, top: int = 50) -> Evaluation:
    """Relations and openness of all classes; `names` of the first classes, the others are called by number."""
    named = [*names[: gates.size], *(f"class {c}" for c in range(len(names), gates.size))]
    unit = unit_gates(gates)
    figures, extremes = openness(gates, top)
    cells, per_cell = matrix(unit, places := order(unit))
    pairs = gates.size * (gates.size + 1) // 2
    metrics: dict[str, float | None] = {**figures, "relation_spread": spread(unit)}
    result = Result(
        dataset=f"{gates.size} classes",
        model=weights.encoder.model.image,
        pretrained=weights.name,
        task="class_relations",
        metrics=metrics,
        details=weights.origin()
        | {"counts": {"classes": gates.size, "pairs": pairs, "dimensions": gates.dim}}
        | {"notes": _notes(metrics, names, gates.size)},
    )
    shown: dict[str, Any] = {
        "matrix": as_png(cells),
        "classes_a_cell": per_cell,
        "order": [named[i] for i in places[::per_cell]],
        "related": _told(most_related(unit, top), named),
        **{kind: _told(pairs_of, named) for kind, pairs_of in extremes.items()},
    }
    return Evaluation(result, {"relations": shown})


def _told(pairs: list[tuple[int, int, float]], names: Sequence[str]) -> list[list[Any]]:
    return [[names[a], names[b], round(score, 4)] for a, b, score in pairs]


def _notes(metrics: dict[str, float | None], names: Sequence[str], classes: int) -> list[str]:
    said = []
    if names and len(names) != classes:
        said.append(f"{len(names)} class names for {classes} classes")
    if (metrics["relation_spread"] or 0) < 1e-3:
        said.append("all classes have the same gate: it does not depend on the class")
    return said
