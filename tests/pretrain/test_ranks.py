"""contrastive_ranks against a sort-free brute force, with ties, ragged ranks and real duplicates."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.distributed.groups import LOCAL
from pretrain.objectives.functional import contrastive_ranks
from tests.ranks import run_ranks

Q, G = 41, 59


def brute(query, gallery, positives) -> list[int]:
    """The definition, one query at a time."""
    scores = (query.double() @ gallery.double().T).float()
    ranks = []
    for q in range(len(query)):
        own = [g for i, g in positives.tolist() if i == q]
        better = [1 + int((scores[q] > scores[q, g]).sum()) + int((scores[q, :g] == scores[q, g]).sum()) for g in own]
        ranks.append(min(better, default=len(gallery) + 1))
    return ranks


def integers(seed: int = 0):
    """Small integers: many exact ties."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(-2, 3, (n, 4), generator=g).float() for n in (Q, G)]


def duplicates(seed: int = 0, d: int = 96):
    """Unit rows of which the gallery holds each two to three times, far apart."""
    g = torch.Generator().manual_seed(seed)
    query, gallery = F.normalize(torch.randn(Q, d, generator=g)), F.normalize(torch.randn(23, d, generator=g))
    return [query, gallery[torch.arange(G) * 7 % 23]]


def pairs(seed: int = 0) -> torch.Tensor:
    """One to four positives a query in no order; queries 5 and 40 have none."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randint(0, Q, (100,), generator=g), torch.randint(0, G, (100,), generator=g)], 1)
    return drawn[(drawn[:, 0] != 5) & (drawn[:, 0] != 40)]


@pytest.mark.parametrize("make", [integers, duplicates])
@pytest.mark.parametrize("tile", [1, 7, 16, 59, 4096, None])
def test_equals_brute_force(make, tile):
    query, gallery = make()
    found = contrastive_ranks(query, gallery, pairs(), tile=tile, group=LOCAL)
    assert found.dtype == torch.int64
    assert found.tolist() == brute(query, gallery, pairs())
    assert found[5] == found[40] == G + 1


def test_duplicates_are_ordered_by_number_alone():
    """Queries are a gallery row that stands three times: its copies rank 1, 2, 3 in their order."""
    gallery = F.normalize(torch.randn(300, 512, generator=torch.Generator().manual_seed(0)))
    gallery[170] = gallery[299] = gallery[3]
    query = gallery[3].repeat(3, 1)
    positives = torch.tensor([[0, 3], [1, 170], [2, 299]])
    for tile in (5, 64, 100, 300):
        assert contrastive_ranks(query, gallery, positives, tile=tile).tolist() == [1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    query, gallery = (x.to(dtype) for x in duplicates())
    assert contrastive_ranks(query, gallery, pairs(), tile=8).tolist() == brute(query, gallery, pairs())


def test_autocast_does_not_reach_inside():
    query, gallery = duplicates()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = contrastive_ranks(query, gallery, pairs(), tile=8)
    assert found.tolist() == brute(query, gallery, pairs())


def test_nan_never_helps():
    query, gallery = duplicates()
    before = contrastive_ranks(query, gallery, pairs())
    gallery[11] = math.nan
    query[3] = math.nan
    after = contrastive_ranks(query, gallery, pairs())
    assert (after >= before).all()
    assert after[3] == G
    assert (contrastive_ranks(query * math.nan, gallery, pairs())[[0, 1, 2, 3]] == G).all()


def ranks_of(rank: int, world: int, split: tuple[list[int], list[int]], only_own: bool):
    found = []
    for make in (integers, duplicates):
        query, gallery = (x.split(counts)[rank] for x, counts in zip(make(), split))
        positives = pairs()
        if only_own:
            low = sum(split[0][:rank])
            positives = positives[(positives[:, 0] >= low) & (positives[:, 0] < low + split[0][rank])]
        found.append(contrastive_ranks(query, gallery, positives, tile=8))
    return found


SPLITS = {1: ([41], [59]), 2: ([30, 11], [0, 59]), 3: ([20, 0, 21], [19, 39, 1])}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_over_ranks(world):
    results = run_ranks(ranks_of, world, SPLITS[world], world == 3)
    for i, make in enumerate((integers, duplicates)):
        assert torch.cat([r[i] for r in results]).tolist() == brute(*make(), pairs())


def test_no_queries_or_no_positives():
    query, gallery = integers()
    none = torch.empty(0, 2, dtype=torch.int64)
    assert contrastive_ranks(query[:0], gallery, none).shape == (0,)
    assert (contrastive_ranks(query, gallery, none) == G + 1).all()
    assert (contrastive_ranks(query, gallery[:0], none) == 1).all()


def test_wrong_arguments_are_named():
    query, gallery = integers()
    with pytest.raises(ValueError, match=r"positive pair \[2, 59\] is beyond the 41 queries and 59 gallery rows"):
        contrastive_ranks(query, gallery, torch.tensor([[0, 1], [2, 59]]))
    with pytest.raises(ValueError, match="same D"):
        contrastive_ranks(query, gallery[:, :3], pairs())
    with pytest.raises(ValueError, match=r"\(M, 2\)"):
        contrastive_ranks(query, gallery, pairs()[:, 0])
