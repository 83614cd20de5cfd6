"""What an embedding folder is meant to hold: `plan.json`, the tars and the encoder. So a build knows what is
missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from index.errors import DamagedCollection, WrongEncoder
from index.store.durable import write_json
from index.store.unit import Done, finished_units

FILE = "plan.json"


@dataclass(frozen=True)
class Plan:
    fingerprint: str
    tars: dict[str, str]  # path -> identity


def read_plan(embeddings: Path) -> Plan | None:
    try:
        return Plan(**json.loads((embeddings / FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DamagedCollection(f"{embeddings / FILE} is damaged ({error}): run index embed again") from error


def extend_plan(embeddings: Path, fingerprint: str, tars: Mapping[str, str]) -> None:
    """Add tars to the plan. `WrongEncoder` when the folder is another encoder's."""
    before = read_plan(embeddings)
    if before is not None and before.fingerprint != fingerprint:
        raise WrongEncoder(
            f"{embeddings} holds embeddings of encoder {before.fingerprint[:12]}, "
            f"this one is {fingerprint[:12]}: give it a folder of its own with --out"
        )
    embeddings.mkdir(parents=True, exist_ok=True)
    known = before.tars if before else {}
    if before is None or any(known.get(path) != identity for path, identity in tars.items()):
        write_json(embeddings / FILE, {"fingerprint": fingerprint, "tars": {**known, **tars}})


def planned_units(embeddings: Path) -> tuple[dict[str, Done], list[str]]:
    """(finished units, tars without one). Units of an earlier state of a tar are left out; of two, the one
    with texts.
    """
    plan = read_plan(embeddings)
    units = finished_units(embeddings)
    if plan is None:
        return units, []
    wanted = {identity: path for path, identity in plan.tars.items()}
    chosen: dict[str, tuple[str, Done]] = {}
    for name, done in units.items():
        if done.source in wanted and (done.source not in chosen or done.texts > chosen[done.source][1].texts):
            chosen[done.source] = (name, done)
    missing = sorted(path for identity, path in wanted.items() if identity not in chosen)
    return dict(chosen.values()), missing
