"""The contrastive score matrix, one tile at a time: what never lies in memory as a whole.

T = s · x yᵀ has N² entries; only one tile (and one as scratch) lives at a time. Rows and columns take their
log-sum-exp from the same tile, so a forward costs one matrix product and a backward three, where a dense loss
that builds both T and Tᵀ costs six. The backward computes the tiles again from what the forward kept: vectors
of length N.

Two ways to the same sums. Where |T| is bounded by what exp can hold, `exp(t - shift)` is taken once with one
shift for all tiles and summed both ways: one exp a tile forward and one backward. Whether that lost anything
is checked afterwards; where it did, and where the bound is too wide or not finite, every row and column is
shifted by its own maximum instead. Nothing here communicates or knows of autograd, weights of zero or ranks:
`contrastive.py` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# dtype -> (largest exponent allowed, smallest log of a sum that has lost nothing), in logs. float32 holds
# exp(-87) to exp(88): exp(64) leaves room for a sum of 10⁹ terms, and what underflows is below exp(-32) of a
# sum of exp(-55).
EXPONENTS = {torch.float32: (64.0, -55.0), torch.float64: (512.0, -600.0)}


class Tile(NamedTuple):
    """A block of the score matrix; `scores` is scratch that the next tile overwrites."""

    rows: slice
    columns: slice
    scores: Tensor  # (h, w)
    excluded: Tensor | None  # (h, w) bool: pairs that are neither positives nor candidates
    diagonal: int  # where the positives lie: scores.diagonal(diagonal), on `positive_rows`

    @property
    def positives(self) -> Tensor:
        """The scores of this tile's positive pairs, as a view; empty in most tiles."""
        return self.scores.diagonal(self.diagonal)

    @property
    def positive_rows(self) -> slice:
        start = self.rows.start + max(0, -self.diagonal)
        return slice(start, start + self.positives.shape[0])


class Normalisers(NamedTuple):
    """What a pass over all tiles leaves: log-sum-exp of rows and columns, and the linear part."""

    rows: Tensor  # (b,) over all columns
    columns: Tensor  # (N,) over this rank's rows only
    positives: Tensor  # (b,)
    smoothed: Tensor  # (), Σ over candidate pairs of score · (smooth_i + smooth_j)
    shift: float | None  # the one shift that was enough; None: every row and column needed its own


@dataclass(frozen=True)
class Scores:
    """One rank's rows of the global score matrix: what the tiles are computed from."""

    image: Tensor  # (b, D) this rank's rows, at least float32
    text: Tensor  # (N, D) the columns of all ranks
    scale: float
    offset: int  # column of row 0's positive
    tile: int
    alike: Tensor | None = None  # (N,) int: columns of equal numbers are never each other's candidates
    smooth: Tensor | None = None  # (N,) weight of a row's (and a column's) scores in label smoothing

    def tiles(self) -> Iterator[Tile]:
        """All tiles, row block by row block; the scores of excluded pairs are still in them."""
        scratch = self.scratch()
        for rows in blocks(self.image.shape[0], self.tile):
            for columns in blocks(self.text.shape[0], self.tile):
                scores = _shaped(scratch, rows, columns)
                torch.addmm(scores, self.image[rows], self.text[columns].T, beta=0, alpha=self.scale, out=scores)
                diagonal = self.offset + rows.start - columns.start
                yield Tile(rows, columns, scores, self._excluded(rows, columns, diagonal), diagonal)

    def scratch(self) -> Tensor:
        """Room for one tile."""
        return self.image.new_empty(min(self.tile, self.image.shape[0]) * min(self.tile, self.text.shape[0]))

    def _excluded(self, rows: slice, columns: slice, diagonal: int) -> Tensor | None:
        if self.alike is None:
            return None
        own = self.alike[rows.start + self.offset : rows.stop + self.offset]
        excluded = own[:, None] == self.alike[columns]
        excluded.diagonal(diagonal).fill_(False)
        return excluded

    def bound(self) -> float:
        """No |score| is above this (Cauchy–Schwarz); NaN or inf where a row is."""
        if not (self.image.shape[0] and self.text.shape[0]):
            return 0.0
        longest = [torch.linalg.vector_norm(side, dim=1).amax() for side in (self.image, self.text)]
        return self.scale * float(longest[0] * longest[1])


def blocks(n: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover range(n)."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def normalise(scores: Scores) -> Normalisers:
    """One pass over the tiles; a second only where the single shift turned out to be too coarse."""
    limit, floor = EXPONENTS[scores.image.dtype]
    bound = scores.bound()
    if bound <= limit:
        return _summed(scores, 0.0)
    if bound <= 2 * limit:
        found = _summed(scores, bound - limit)
        lowest = torch.cat([found.rows, found.columns]).amin()
        if float(lowest) - (bound - limit) >= floor:
            return found
    return _merged(scores)


def gradients(
    scores: Scores, rows: Tensor, columns: Tensor, targets: Tensor, shift: float | None
) -> tuple[Tensor, Tensor]:
    """(G y (b, D), Gᵀ x (N, D)) with G = e^(T - rows) + e^(T - columns) - diag(targets) - smoothing.

    `rows` (b,) and `columns` (N,) are global log-sum-exps less the log of the pair's weight, so that weights
    cost no pass; `shift` is that of `normalise`. The factor s / (2 · total weight) is left to the caller.
    """
    d_image, d_text = torch.zeros_like(scores.image), torch.zeros_like(scores.text)
    scratch = scores.scratch()
    if shift is not None:
        rows, columns = (shift - rows).exp(), (shift - columns).exp()
    for tile in scores.tiles():
        spare = _shaped(scratch, tile.rows, tile.columns)
        if shift is None:
            _probabilities(tile, rows, columns, spare)
        else:
            _shifted_probabilities(tile, rows, columns, shift, spare)
        if scores.smooth is not None:
            tile.scores.sub_(torch.add(*_outer(scores.smooth, scores.offset, tile), out=spare))
        if tile.excluded is not None:
            tile.scores.masked_fill_(tile.excluded, 0.0)
        tile.positives.sub_(targets[tile.positive_rows])
        d_image[tile.rows].addmm_(tile.scores, scores.text[tile.columns])
        d_text[tile.columns].addmm_(tile.scores.T, scores.image[tile.rows])
    return d_image, d_text


def _summed(scores: Scores, shift: float) -> Normalisers:
    """Rows and columns by one exp a tile; right where no sum fell below the floor."""
    found = _empty(scores, 0.0, shift)
    for tile in scores.tiles():
        _read_linear(scores, tile, found)
        exponentials = (tile.scores.sub_(shift) if shift else tile.scores).exp_()
        if tile.excluded is not None:
            exponentials.masked_fill_(tile.excluded, 0.0)
        found.rows[tile.rows] += exponentials.sum(1)
        found.columns[tile.columns] += exponentials.sum(0)
    return found._replace(rows=found.rows.log_().add_(shift), columns=found.columns.log_().add_(shift))


def _merged(scores: Scores) -> Normalisers:
    """Rows and columns each shifted by their own maximum, tile after tile: right for any finite scores."""
    found = _empty(scores, -torch.inf, None)
    for tile in scores.tiles():
        _read_linear(scores, tile, found)
        if tile.excluded is not None:
            tile.scores.masked_fill_(tile.excluded, -torch.inf)
        for normaliser, dim in ((found.rows[tile.rows], 1), (found.columns[tile.columns], 0)):
            torch.logaddexp(normaliser, tile.scores.logsumexp(dim), out=normaliser)
    return found


def _shifted_probabilities(tile: Tile, rows: Tensor, columns: Tensor, shift: float, spare: Tensor) -> None:
    """scores <- e^(scores - shift) · (rows_i + columns_j), by one exp."""
    torch.add(rows[tile.rows, None], columns[tile.columns], out=spare)
    (tile.scores.sub_(shift) if shift else tile.scores).exp_().mul_(spare)


def _probabilities(tile: Tile, rows: Tensor, columns: Tensor, spare: Tensor) -> None:
    """scores <- e^(scores - rows_i) + e^(scores - columns_j); no exponent is above the log of a weight."""
    torch.sub(tile.scores, rows[tile.rows, None], out=spare).exp_()
    tile.scores.sub_(columns[tile.columns]).exp_().add_(spare)


def _read_linear(scores: Scores, tile: Tile, found: Normalisers) -> None:
    """Keep the positives' scores, and for label smoothing the weighted sum of all candidates' scores."""
    found.positives[tile.positive_rows] = tile.positives
    if scores.smooth is not None:
        kept = tile.scores if tile.excluded is None else tile.scores.masked_fill(tile.excluded, 0.0)
        row_weight, column_weight = _outer(scores.smooth, scores.offset, tile)
        found.smoothed.add_((kept @ column_weight).sum() + (row_weight[:, 0] @ kept).sum())


def _outer(smooth: Tensor, offset: int, tile: Tile) -> tuple[Tensor, Tensor]:
    """The smoothing weights of a tile's rows (h, 1) and columns (w,)."""
    own = smooth[tile.rows.start + offset : tile.rows.stop + offset]
    return own[:, None], smooth[tile.columns]


def _empty(scores: Scores, value: float, shift: float | None) -> Normalisers:
    new = scores.image.new_full
    b, n = scores.image.shape[0], scores.text.shape[0]
    return Normalisers(new((b,), value), new((n,), value), new((b,), 0.0), new((), 0.0), shift)


def _shaped(scratch: Tensor, rows: slice, columns: slice) -> Tensor:
    h, w = rows.stop - rows.start, columns.stop - columns.start
    return scratch[: h * w].view(h, w)
