"""The certificate: what was found, as a table for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.certify.cells import BAR, Cell
from pretrain.certify.peers import Peer
from pretrain.durable import write_text


@dataclass(frozen=True)
class Certificate:
    """Gradients of every backend, world and accumulation against float64."""

    recipe: str
    about: dict[str, Any]
    """Date, seed, versions, how the recipe was made small, what the reference is."""
    cells: Sequence[Cell]
    peers: Sequence[Peer]

    @property
    def passed(self) -> bool:
        """Nothing failed, and something passed: refusals and approximations alone are no certificate."""
        verdicts = {cell.verdict for cell in self.cells}
        return "PASS" in verdicts and "FAIL" not in verdicts

    def text(self) -> str:
        """The table, and below it what its figures do not say."""
        worlds = sorted({cell.world for cell in self.cells})
        rows = [["backend", "accumulation", *(f"world {w}" for w in worlds)]]
        for key in dict.fromkeys((c.backend, c.accumulation) for c in self.cells):
            found = {c.world: c for c in self.cells if (c.backend, c.accumulation) == key}
            rows.append([key[0], str(key[1]), *(_shown(found[w]) if w in found else "" for w in worlds)])
        verdict = "FAIL" if not self.passed else "PASS in float64" if self._rounded() else "PASS"
        head = [f"{verdict}: gradients of {self.recipe}, worst of all parameters, bar {BAR:g}"]
        head += [f"  {line}" for line in (self.about["reference"], *self.about["made small"])]
        return "\n".join([*head, "", *_aligned(rows), *self._notes(), *self._beside(worlds)]) + "\n"

    def write(self, path: Path) -> None:
        """`path` as JSON, and the table beside it as `.txt`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = {"cells": [asdict(c) for c in self.cells], "peers": [asdict(p) for p in self.peers]}
        record = {"passed": self.passed, "recipe": self.recipe, "bar": BAR, **self.about, **parts}
        write_text(path, json.dumps(record, indent=1) + "\n")
        write_text(path.with_suffix(".txt"), self.text())

    def _notes(self) -> list[str]:
        failed = [c for c in self.cells if c.verdict == "FAIL"]
        lines = [f"FAIL {c.backend}, world {c.world}, accumulation {c.accumulation}: {_why(c)}" for c in failed]
        lines += [f"{c.backend} is refused, as in training: {c.note}" for c in self.cells if c.verdict == "refused"]
        if rounded := self._rounded():
            most = max(rounded, key=lambda c: c.figure or 0.0)
            lines.append(
                "a second figure is the same backend's in float64 (zero1-3 reduce in fp32 also then): the first is "
                f"fp32's rounding in these towers, most in {most.parameter} ({most.backend}, world {most.world}); "
                "near 1, the true gradient is 0"
            )
        if any(c.verdict == "approx" for c in self.cells):
            lines.append(
                "approx: BatchNorm of a tower sees a part of the batch at a time, by the recipe's choice: held to the "
                "same bar, against float64 normalised in the same parts; in brackets how far it is from the gradient "
                "of the whole batch"
            )
        return ["", *dict.fromkeys(lines)] if lines else []

    def _rounded(self) -> list[Cell]:
        """Cells that float64 alone brings within the bar."""
        return [c for c in self.cells if c.verdict in ("PASS", "approx") and c.figure64 is not None]

    def _beside(self, worlds: Sequence[int]) -> list[str]:
        if not self.peers:
            return []
        rows = [["losses over ranks, on the same features", *(f"world {w}" for w in worlds if w > 1)]]
        for name in dict.fromkeys(p.name for p in self.peers):
            rows.append([name, *(_beside(p) for p in self.peers if p.name == name)])
        return ["", *_aligned(rows)]


def _shown(c: Cell) -> str:
    figures = [f"{figure:.1e}" for figure in (c.figure, c.figure64) if figure is not None]
    return " ".join([*figures, c.verdict, *([f"({c.away:.0e})"] if c.away is not None else [])])


def _why(c: Cell) -> str:
    if c.figure is None:
        return c.note
    in_float64 = f", in float64 {c.parameter64} {c.figure64:.1e}" if c.figure64 is not None else ""
    return f"{c.parameter} {c.figure:.1e} off{in_float64}"


def _beside(peer: Peer) -> str:
    return peer.note if peer.figure is None else f"{peer.figure:.1e} off; {peer.note}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
