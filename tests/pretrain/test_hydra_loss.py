"""hydra_loss and hydra_partners against the plain B x D x N formula, in one process and over gloo ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.objectives.functional import hydra_loss, hydra_partners
from pretrain.objectives.functional.hydra import hydra_logits, hydra_rows
from tests.ranks import run_ranks

ROWS, DIM, CLASSES = 37, 9, 6
FORMS = ("gated_cosine", "gated_dot")


def scene(seed: int = 0, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """Rows of several lengths; row 3 has no label, row 8 no partner; class 5 is a partner, but no key's."""
    g = torch.Generator().manual_seed(seed)
    anchors, keys, gates = (torch.randn(rows, DIM, generator=g, dtype=torch.float64) for _ in range(3))
    labels = torch.randint(0, CLASSES - 1, (rows,), generator=g)
    partners = torch.randint(0, CLASSES, (rows,), generator=g)
    labels[3:4], partners[8:9] = -1, -1
    temperature = torch.tensor([0.2], dtype=torch.float64)
    gates = gates.sigmoid()
    return {"anchors": 3 * anchors, "keys": keys, "gates": gates, "temperature": temperature,
            "labels": labels, "partners": partners}  # fmt: skip


LEARNED = ("anchors", "keys", "gates", "temperature")


def direct_logits(anchors, keys, gates, form) -> torch.Tensor:
    """The formulas with every product of B x N x D spelled out."""
    if form == "gated_cosine":
        z, k = (gates * anchors)[:, None].expand(-1, len(keys), -1), gates[:, None] * keys[None]
        return F.cosine_similarity(z, k, dim=2)
    unit, others = F.normalize(anchors, dim=1), F.normalize(keys, dim=1)
    return (gates[:, None] ** 2 * unit[:, None] * others[None]).sum(2)


def direct(anchors, keys, gates, temperature, labels, partners, *, form, self_pairs=False) -> torch.Tensor:
    """The definition, one anchor and one positive at a time."""
    logits = direct_logits(anchors, keys, gates, form) / temperature
    there = ((labels >= 0) & (partners >= 0)).tolist()
    total, count = anchors.new_zeros(()), 0
    for i in range(len(anchors)):
        others = [j for j in range(len(keys)) if there[i] and there[j] and not (self_pairs and i == j)]
        negatives = [j for j in others if labels[j] not in (labels[i], partners[i])]
        for p in (j for j in others if labels[j] == partners[i]):
            denominator = torch.logsumexp(logits[i, [p, *negatives]], 0)
            total, count = total + denominator - logits[i, p], count + 1
    return total / max(count, 1)


def values_and_gradients(loss, given, **options) -> list[torch.Tensor]:
    leaves = {n: x.detach().clone().requires_grad_(n in LEARNED) for n, x in given.items()}
    value = loss(**leaves, **options)
    gradients = torch.autograd.grad(value, [leaves[n] for n in LEARNED], allow_unused=True)
    return [value.detach(), *(torch.zeros_like(given[n]) if g is None else g for n, g in zip(LEARNED, gradients))]


def assert_same(found, wanted, rtol: float = 1e-12) -> None:
    for name, a, b in zip(("loss", *LEARNED), found, wanted):
        assert a.shape == b.shape, name
        assert a.isfinite().all(), name
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-3)
        assert error <= rtol, f"{name}: relative error {error:.2e}"


# ----------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("self_pairs", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradients_are_those_of_the_direct_formula(form, temperature, self_pairs):
    given = scene()
    given["temperature"].fill_(temperature)
    wanted = values_and_gradients(direct, given, form=form, self_pairs=self_pairs)
    assert wanted[0] > 0.1
    assert_same(values_and_gradients(hydra_loss, given, form=form, self_pairs=self_pairs), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_two_products_are_those_of_the_large_one(form):
    given = scene()
    found = hydra_logits(given["anchors"], given["keys"], given["gates"], form)
    wanted = direct_logits(given["anchors"], given["keys"], given["gates"], form)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


def test_nearly_closed_gates_keep_their_cosine():
    given = scene()
    shut = given["gates"].float() * 1e-9
    found = hydra_logits(given["anchors"].float(), given["keys"].float(), shut, "gated_cosine")
    wanted = direct_logits(given["anchors"], given["keys"], given["gates"], "gated_cosine")
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_open_gates_and_own_partners_are_a_supervised_contrastive_loss(form):
    """Per positive pair, -log of e^positive / (e^positive + all of other classes), on plain cosines."""
    given = scene()
    labels = given["labels"].clamp(min=0)
    z, k = F.normalize(given["anchors"], dim=1), F.normalize(given["keys"], dim=1)
    cosine = z @ k.T / 0.1
    same = labels[:, None] == labels[None]
    others = cosine.exp().masked_fill(same, 0).sum(1, keepdim=True)
    wanted = -(cosine - (cosine.exp() + others).log())[same].mean()
    found = hydra_loss(given["anchors"], given["keys"], torch.ones_like(z), labels, labels, form=form)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_open_gates_with_one_positive_each_are_ntxent_of_lightly():
    """Classes of one image: SupCon's and NT-Xent's special case, with keys of the other view only."""
    peer = pytest.importorskip("lightly.loss").NTXentLoss
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 20, DIM, generator=g, dtype=torch.float64)
    # NT-Xent: all 2 B rows against all others, the own pair left out
    both, other = torch.cat([a, b]), torch.cat([b, a])
    labels = torch.arange(20).repeat(2)
    wanted = peer(temperature=0.1)(a, b)
    found = hydra_loss(both, both, torch.ones_like(other), labels, labels, self_pairs=True, temperature=0.1)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_keys_of_their_own():
    """Keys beyond the anchors, with classes of their own: the anchors' rows of a larger scene."""
    given, few = scene(), 11
    part = {n: x if n in ("temperature", "keys") else x[:few] for n, x in given.items()}
    there = (given["labels"] >= 0) & (given["partners"] >= 0)
    found = hydra_rows(**part, key_labels=torch.where(there, given["labels"], -1))
    whole = hydra_rows(**given)
    for a, b in zip(found, whole):
        torch.testing.assert_close(a, b[:few], rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------- absent rows, empty cases, precision


@pytest.mark.parametrize("form", FORMS)
def test_what_an_absent_row_holds_reaches_nothing(form):
    given = scene()
    wanted = values_and_gradients(hydra_loss, given, form=form)
    for name in ("anchors", "keys", "gates"):
        given[name][3], given[name][8] = math.nan, math.inf
    found = values_and_gradients(hydra_loss, given, form=form)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    assert all(g[[3, 8]].eq(0).all() for g in found[1:4])


def test_nan_in_a_row_that_counts_shows():
    given = scene()
    given["keys"][0] = math.nan
    assert hydra_loss(**given).isnan()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["empty", "one row", "no label", "no positive", "no negative"])
def test_nothing_to_compare_is_zero(form, case):
    given = scene(rows={"empty": 0, "one row": 1}.get(case, ROWS))
    if case == "no label":
        given["labels"][:] = -1
    if case == "no positive":
        given["partners"][:] = CLASSES - 1
    if case in ("no negative", "one row"):
        given["labels"][:], given["partners"][:] = 2, 2
    assert all(x.eq(0).all() for x in values_and_gradients(hydra_loss, given, form=form))


@pytest.mark.parametrize("form", FORMS)
def test_zero_rows_and_closed_gates_have_finite_gradients(form):
    given = scene()
    given["anchors"][0], given["keys"][1], given["gates"][2] = 0, 0, 0
    assert all(x.isfinite().all() for x in values_and_gradients(hydra_loss, given, form=form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_and_autocast_are_scored_in_float32(form, dtype):
    given = {n: x.to(dtype) if n in LEARNED[:3] else x for n, x in scene().items()}
    given["temperature"] = torch.tensor([0.01])  # scale 100
    full = {n: x.float() if n in LEARNED else x for n, x in given.items()}
    wanted = values_and_gradients(hydra_loss, full, form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = values_and_gradients(hydra_loss, given, form=form)
    assert [x.dtype for x in found] == [torch.float32, dtype, dtype, dtype, torch.float32]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, wanted))
    exact = {n: x.double() if n in LEARNED else x for n, x in given.items()}
    # a score of size 100 in float32 is off by 1e-5
    assert_same(wanted, values_and_gradients(direct, exact, form=form), rtol=1e-4)


def test_wrong_arguments_are_named():
    given = scene()
    for message, wrong in {
        "anchors and gates": {"gates": given["gates"][:4]},
        r"keys must be \(37, 9\)": {"keys": given["keys"][:4]},
        "partners must be one an anchor": {"partners": given["partners"][:4]},
        "self_pairs": {"self_pairs": True, "key_labels": given["labels"]},
        "'cosine'": {"form": "cosine"},
    }.items():
        with pytest.raises(ValueError, match=message):
            hydra_loss(**{**given, **wrong})


# ----------------------------------------------------------------------------- partners


def partners_on(rank: int, world: int, counts: list[int], mode: str, step: int = 5) -> torch.Tensor:
    start = sum(counts[:rank])
    labels = scene()["labels"][start : start + counts[rank]]
    return hydra_partners(labels, seed=7, step=step, mode=mode, num_classes=CLASSES)


MODES = ("arbitrary", "identical", "distinct")
SPLITS = {1: [ROWS], 2: [20, 17], 3: [14, 0, 23]}


def test_arbitrary_partners_are_the_batch_in_another_order():
    labels, partners = scene()["labels"], partners_on(0, 1, SPLITS[1], "arbitrary")
    there = labels >= 0
    assert torch.equal(partners[there].sort().values, labels[there].sort().values)
    assert partners[~there].eq(-1).all()
    assert not torch.equal(partners, labels)
    assert not torch.equal(partners, partners_on(0, 1, SPLITS[1], "arbitrary", step=6))
    assert not torch.equal(partners, hydra_partners(labels, seed=8, step=5))


def test_every_order_of_the_batch_is_equally_likely():
    labels = torch.tensor([0, -1, 1, 2])
    seen: dict[tuple, int] = {}
    for step in range(3000):
        order = tuple(hydra_partners(labels, seed=0, step=step).tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 6
    assert all(400 < n < 600 for n in seen.values())  # five standard deviations about 500


def test_distinct_partners_are_all_others_alike():
    labels = torch.full((6000,), 2)
    partners = hydra_partners(labels, seed=0, step=0, mode="distinct", num_classes=4)
    counts = partners.bincount(minlength=4).tolist()
    assert counts[2] == 0
    assert all(1800 < n < 2200 for n in (counts[0], counts[1], counts[3]))


def test_identical_partners_are_the_labels():
    assert hydra_partners(torch.tensor([3, -1, -7]), seed=0, step=0, mode="identical").tolist() == [3, -1, -1]


def test_wrong_modes_are_named():
    for mode, number in (("distinct", None), ("distinct", 1), ("any", 4)):
        with pytest.raises(ValueError, match=mode):
            hydra_partners(torch.zeros(3, dtype=torch.int64), seed=0, step=0, mode=mode, num_classes=number)


# ----------------------------------------------------------------------------- ranks


def gradients_on(rank: int, world: int, counts: list[int]) -> list[list[torch.Tensor]]:
    start = sum(counts[:rank])
    given = scene()
    mine = {n: x if n == "temperature" else x[start : start + counts[rank]] for n, x in given.items()}
    return [
        values_and_gradients(hydra_loss, mine, form=form, self_pairs=self_pairs)
        for form in FORMS
        for self_pairs in (False, True)
    ]


def everything_on(rank: int, world: int):
    counts = SPLITS[world]
    return gradients_on(rank, world, counts), [partners_on(rank, world, counts, mode) for mode in MODES]


@pytest.mark.parametrize("world", [2, 3])
def test_worlds_agree(world):
    wanted, partners = everything_on(0, 1)
    ranks = run_ranks(everything_on, world)
    for case, expected in enumerate(wanted):
        parts = [found[case] for found, _ in ranks]
        # what DDP makes of it: parameters behind a row see that rank's gradient / W; the temperature the mean
        rows = [torch.cat([p[k] for p in parts]) / world for k in (1, 2, 3)]
        temperature = torch.stack([p[4] for p in parts]).mean(0)
        for p in parts:
            assert_same([p[0], *rows, temperature], expected)
    for mode, expected in enumerate(partners):
        assert torch.equal(torch.cat([found[mode] for _, found in ranks]), expected)


def nothing_on(rank: int, world: int) -> list[torch.Tensor]:
    given = scene(rows=3 if rank == 0 else 0)
    given["partners"][:] = CLASSES - 1
    return values_and_gradients(hydra_loss, given)


def test_ranks_without_a_positive_get_zero():
    for found in run_ranks(nothing_on, 2):
        assert all(x.eq(0).all() for x in found)
