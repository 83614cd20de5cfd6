"""One evaluation's result as a file: the JSON that CLIP_benchmark writes and reads, and what it lacks beside
it.

CLIP_benchmark's `build` takes every `*.json` of a folder and needs `dataset`, `model`, `pretrained`, `task`,
`metrics` and `language`; further keys become further columns. So intervals, chance levels and provenance
stand beside `metrics`, and pictures stand in the folder `pictures/`, which `build` does not enter.

Does not hold embeddings: those belong to `index embed`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain.durable import write_text
from pretrain.errors import UserError

NEEDED = ("dataset", "model", "pretrained", "task", "metrics")
UNTRAINED = "untrained"


@dataclass
class Result:
    """What one evaluation found. Field order is the file's key order."""

    dataset: str  # the data set's name, without its split
    model: str  # the architecture, e.g. a timm name
    pretrained: str  # which weights: "RUN@step_00000100", "untrained", or the name given with --name
    task: str  # "zeroshot_retrieval", "zeroshot_classification" (CLIP_benchmark's names) or "knn"
    metrics: dict[str, float | None]  # shares in 0..1, ranks from 1; None where undefined (acc5 of 3 classes)
    language: str = "en"
    intervals: dict[str, list[float]] = field(default_factory=dict)  # metric -> [low, high], 95 %
    chance: dict[str, float] = field(default_factory=dict)  # metric -> what guessing gives
    details: dict[str, Any] = field(default_factory=dict)  # run, step, fingerprint, counts, notes, how intervals came

    @property
    def stem(self) -> str:
        """The file name without ending: task, data set and weights, so that no two results collide."""
        return slug(f"{self.task}_{self.dataset}_{self.pretrained}")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data: no NaN (not JSON; null instead)."""
        return _finite(asdict(self))


def slug(name: str) -> str:
    """`name` with what does not belong in a file name replaced by "-"."""
    return re.sub(r"[^A-Za-z0-9._@+-]+", "-", name).strip("-.") or "unnamed"


def write(result: Result, folder: Path, pictures: dict[str, Any] | None = None) -> Path:
    """Write the result, and its pictures where there are any; returns the result's path.

    Each file appears whole or not at all. An earlier result of the same task, data and weights is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.stem}.json"
    if pictures is not None:
        place = pictures_path(path)
        place.parent.mkdir(exist_ok=True)
        write_text(place, json.dumps(_finite(pictures), separators=(",", ":")))
    write_text(path, json.dumps(result.as_dict(), indent=1))
    return path


def pictures_path(result: Path) -> Path:
    """Where the pictures of the result at this path lie."""
    return result.parent / "pictures" / result.name


def read(path: Path) -> Result:
    """Read a result, CLIP_benchmark's own included. UserError names the file and what it lacks."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not a readable JSON file ({e})") from e
    lacking = [k for k in NEEDED if not isinstance(data, dict) or k not in data]
    if lacking or not isinstance(data["metrics"], dict):
        raise UserError(f"{path}: not an evaluation result: lacks {', '.join(lacking) or 'a table of metrics'}")
    names: dict[str, Any] = {k: str(data[k]) for k in ("dataset", "model", "pretrained", "task")}
    tables: dict[str, Any] = {k: data[k] for k in ("intervals", "chance", "details") if isinstance(data.get(k), dict)}
    result = Result(**names, **tables, metrics={k: _number(v) for k, v in data["metrics"].items()})
    result.language = str(data.get("language") or "en")
    result.intervals = {k: v for k, v in result.intervals.items() if _is_interval(v)}
    result.chance = {k: v for k, v in result.chance.items() if _number(v) is not None}
    return result


def read_pictures(result: Path) -> dict[str, Any]:
    """The pictures of the result at this path; empty where it has none."""
    path = pictures_path(result)
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: not a readable JSON file ({e}); run the evaluation again") from e
    return data if isinstance(data, dict) else {}


def _number(value: Any) -> float | None:
    """A metric as a finite number, or None: CLIP_benchmark writes NaN and, for some, lists."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and None not in map(_number, value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
