"""The rank of each query's best positive, tile by tile: retrieval recall without a Q × G matrix or a sort.

Ties are where counting goes wrong: a dot product and an entry of a matrix product differ in the last bit, and
so may two tiles of different shape. Here products are summed in float64 and rounded to float32 once, so that
equal rows score equal wherever they stand, and the positive's score is read from the very tile it is compared
with. Recall, medians and their intervals are the evaluation's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.distributed.collectives import all_gather_rows, row_counts
from pretrain.distributed.groups import Group, resolve
from pretrain.objectives.functional.tiles import blocks


@torch.no_grad()
def ranks(query: Tensor, gallery: Tensor, positives: Tensor, tile: int, group: Group) -> Tensor:
    """(Q,) int64; see `functional.contrastive_ranks`."""
    _, rank, _ = resolve(group)
    counts = row_counts(query.shape[0], query.device, group)
    gallery = all_gather_rows(gallery, group)
    _check_pairs(positives, sum(counts), gallery.shape[0])
    local = positives.cpu() - torch.tensor([sum(counts[:rank]), 0])
    with torch.autocast(query.device.type, enabled=False):
        found = [_block(query[rows], gallery, local, rows, tile) for rows in blocks(query.shape[0], tile)]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=query.device)


def _block(query: Tensor, gallery: Tensor, positives: Tensor, rows: slice, tile: int) -> Tensor:
    """(h,) ranks of one block of queries: first the tiles that hold its positives, then all."""
    query = query.double()
    inside = (positives[:, 0] >= rows.start) & (positives[:, 0] < rows.stop)
    best, first = _best_positives(query, gallery, positives[inside] - torch.tensor([rows.start, 0]), tile)
    ahead = torch.zeros_like(first)
    for columns in blocks(gallery.shape[0], tile):
        scores = _scores(query, gallery[columns])
        numbers = torch.arange(columns.start, columns.stop, device=query.device)
        earlier = (scores == best[:, None]) & (numbers < first[:, None])
        ahead += (~(scores <= best[:, None]) | earlier).sum(1)  # not "scores > best": NaN must count
    n = gallery.shape[0]
    return torch.where(first == n, n, ahead.clamp(max=n - 1)) + 1


def _best_positives(query: Tensor, gallery: Tensor, pairs: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Each query's highest positive score (h,) and the lowest gallery number that has it (h,), G for none."""
    n = gallery.shape[0]
    best = torch.full((query.shape[0],), -torch.inf, device=query.device)
    first = torch.full((query.shape[0],), n, device=query.device)
    block = pairs[:, 1].div(tile, rounding_mode="floor")
    for number in block.unique().tolist():
        columns = slice(number * tile, min((number + 1) * tile, n))
        row, column = pairs[block == number].to(query.device).unbind(1)
        score = _scores(query, gallery[columns])[row, column - columns.start].nan_to_num_(nan=-torch.inf)
        before = best.clone()
        best.scatter_reduce_(0, row, score, "amax")
        first[best > before] = n
        first.scatter_reduce_(0, row, torch.where(score == best[row], column, n), "amin")
    return best, first


def _scores(query: Tensor, gallery: Tensor) -> Tensor:
    return (query @ gallery.double().T).float()


def _check_pairs(positives: Tensor, queries: int, gallery: int) -> None:
    limits = torch.tensor([queries, gallery], device=positives.device)
    beyond = ((positives < 0) | (positives >= limits)).any(1)
    if beyond.any():
        worst = positives[beyond][0].tolist()
        raise ValueError(f"positive pair {worst} is beyond the {queries} queries and {gallery} gallery rows there are")
