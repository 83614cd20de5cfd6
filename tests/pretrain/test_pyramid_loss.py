"""pyramid_clip_loss against the six terms written out, against CLIP, in one process and over gloo ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.objectives.functional import clip_loss, contrastive, pyramid_clip_loss
from pretrain.objectives.functional.pyramid import CONTRASTS, IMAGES, TEXTS, pyramid_losses
from tests.ranks import run_ranks

N, D = 31, 8
NAMES = (*IMAGES, *TEXTS)
WEIGHTS = (0.5, 0.3, 0.2)
IDS = torch.arange(N) % 27  # four pairs of equal id
WEIGHT = (torch.arange(N) % 7 != 3).double()


def features(n: int = N, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(n, D, generator=g, dtype=torch.float64)
    return {name: F.normalize(common + torch.randn(n, D, generator=g, dtype=torch.float64), dim=1) for name in NAMES}


def present(n: int = N) -> dict[str, torch.Tensor]:
    rows = torch.arange(n)
    return {"summary": rows % 3 != 1, "tags": rows % 4 != 0, "regions": rows % 5 < 3}


def scale(value: float = 1 / 0.07) -> torch.Tensor:
    return torch.tensor([math.log(value)], dtype=torch.float64)


def softened(image, text, log_scale, alpha: float, ids, weight) -> torch.Tensor:
    """S(v, l) of the paper row by row, over the rows of weight above 0."""
    rows = weight > 0
    image, text, ids, weight = image[rows], text[rows], ids[rows], weight[rows]
    if not len(image):
        return image.sum()
    logits = log_scale.exp() * image @ text.T
    total = logits.new_zeros(())
    for i in range(len(image)):
        candidates = ids != ids[i]
        candidates[i] = True
        target = torch.full((int(candidates.sum()),), alpha / max(1, int(candidates.sum()) - 1), dtype=image.dtype)
        target[candidates[:i].sum()] = 1 - alpha if len(target) > 1 else 1.0
        for row in (logits[i], logits[:, i]):
            total = total - weight[i] * (target * row[candidates].log_softmax(0)).sum()
    return total / (2 * weight.sum())


def plain(x, log_scale, *, softening=0.2, weights=(1 / 3,) * 3, present=None, ids=None, weight=None) -> torch.Tensor:
    """The formula of the paper, term after term."""
    n = len(x["global"])
    ids = torch.arange(n) if ids is None else ids
    weight = torch.ones(n, dtype=torch.float64) if weight is None else weight
    there = {name: weight * (present or {}).get(name, torch.ones(n)) for name in NAMES}

    def s(v: str, l: str) -> torch.Tensor:
        both = torch.where((there[v] > 0) & (there[l] > 0), weight, 0.0)
        return softened(x[v], x[l], log_scale, softening, ids, both)

    peer = (s("global", "summary") + s("local", "text")) / 2
    across_global = (s("global", "tags") + s("regions", "summary")) / 2
    across_local = (s("local", "tags") + s("regions", "text")) / 2
    return weights[0] * peer + weights[1] * across_global + weights[2] * across_local


def grads(of, x, log_scale, **options) -> dict[str, torch.Tensor]:
    leaves = {name: f.detach().clone().requires_grad_() for name, f in x.items()}
    log_scale = log_scale.detach().clone().requires_grad_()
    loss = of(leaves, log_scale, **options)
    loss.backward()
    return {"loss": loss.detach(), "scale": log_scale.grad, **{n: f.grad for n, f in leaves.items()}}


def assert_same(found: dict, wanted: dict, bound: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        value = torch.zeros_like(found[name]) if value is None else value
        assert (found[name] - value).abs().max() <= bound * value.abs().max().clamp(min=1e-2), name


CASES = {
    "plain": {},
    "softening": {"softening": 0.9},
    "none": {"softening": 0.0},
    "weights": {"weights": WEIGHTS},
    "present": {"present": present()},
    "all": {"weights": WEIGHTS, "present": present(), "ids": IDS, "weight": WEIGHT},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("factor", [14.3, 100.0])
def test_value_and_gradients_are_those_of_the_formula(case, factor):
    x = features()
    wanted = grads(plain, x, scale(factor), **CASES[case])
    for tile in (4, 1000):
        assert_same(grads(pyramid_clip_loss, x, scale(factor), tile=tile, **CASES[case]), wanted)


def test_gradcheck():
    x = features(7)
    leaves = [f.requires_grad_() for f in x.values()] + [scale().requires_grad_()]
    options = {"present": present(7), "tile": 3, "weights": WEIGHTS}
    assert torch.autograd.gradcheck(lambda *f: 3 * pyramid_clip_loss(dict(zip(NAMES, f)), f[-1], **options), leaves)


def test_softening_is_cross_entropy_with_this_label_smoothing():
    x, alpha = features(), 0.2
    logits = scale().exp() * x["local"] @ x["text"].T
    target = torch.arange(N)
    smoothing = alpha * N / (N - 1)
    wanted = sum(F.cross_entropy(m, target, label_smoothing=smoothing) for m in (logits, logits.T)) / 2
    found = pyramid_clip_loss({k: x[k] for k in ("local", "text")}, scale(), softening=alpha, weights=(2, 0, 0))
    assert float(found) == pytest.approx(float(wanted), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_cross_terms_and_softening_it_is_clip_to_the_bit(dtype):
    image, text = (f.to(dtype) for f in list(features().values())[:2])
    leaves = [f.clone().requires_grad_() for f in (image, text, scale().to(dtype))]
    clip = clip_loss(*leaves, ids=IDS, weight=WEIGHT)
    clip.backward()
    again = [f.clone().requires_grad_() for f in (image, text, scale().to(dtype))]
    views = {"global": again[0], "local": again[0], "summary": again[1], "text": again[1]}
    found = pyramid_clip_loss(views, again[2], softening=0.0, weights=(1, 0, 0), ids=IDS, weight=WEIGHT)
    found.backward()
    assert torch.equal(found, clip)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(again, leaves))


def test_what_an_absent_row_holds_reaches_nothing():
    x = features()
    wanted = grads(pyramid_clip_loss, x, scale(), present=present())
    for name, rows in present().items():
        x[name] = torch.where(rows[:, None], x[name], math.nan)
    found = grads(pyramid_clip_loss, x, scale(), present=present())
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(found[name][~rows].eq(0).all() for name, rows in present().items())


def test_a_field_absent_everywhere_takes_its_terms_and_changes_no_other():
    x = features()
    nowhere = {"tags": torch.zeros(N, dtype=torch.bool), "regions": torch.zeros(N, dtype=torch.bool)}
    loss, terms = pyramid_losses(x, scale(), softening=0.2, weights=WEIGHTS, present=nowhere, ids=None, weight=None)
    peer = {k: x[k] for k in ("global", "local", "summary", "text")}
    without = pyramid_clip_loss(peer, scale(), weights=WEIGHTS)
    assert float(loss) == pytest.approx(float(without), rel=1e-14)
    assert [name for name, term in terms.items() if term == 0] == [c.name for c in CONTRASTS[2:]]


def test_a_field_absent_everywhere_computes_no_scores(monkeypatch):
    rows = []
    true = contrastive.normalise
    monkeypatch.setattr(contrastive, "normalise", lambda s: rows.append(len(s.image) * len(s.text)) or true(s))
    nowhere = {name: torch.zeros(N, dtype=torch.bool) for name in ("summary", "tags", "regions")}
    pyramid_clip_loss(features(), scale(), present=nowhere)
    assert rows == [0, N * N, 0, 0, 0, 0]


@pytest.mark.parametrize("n", [0, 1])
def test_none_or_one_is_zero(n):
    found = grads(pyramid_clip_loss, features(n), scale())
    assert all(f.eq(0).all() or f.abs().max() < 1e-12 for f in found.values())


def test_without_a_term_it_is_zero_whatever_the_features_hold():
    some = features(4)["global"].fill_(torch.nan).requires_grad_()
    loss = pyramid_clip_loss({"global": some}, scale())
    loss.backward()
    assert loss == 0
    assert some.grad.eq(0).all()


def test_wrong_arguments_are_named():
    x = features(4)
    for message, call in {
        "not txt": lambda: pyramid_clip_loss({"txt": x["text"]}, scale()),
        "of one shape": lambda: pyramid_clip_loss({**x, "tags": x["tags"][:3]}, scale()),
        "softening": lambda: pyramid_clip_loss(x, scale(), softening=1.0),
        "three numbers": lambda: pyramid_clip_loss(x, scale(), weights=(1, 2)),
        r"present\['tags'\]": lambda: pyramid_clip_loss(x, scale(), present={"tags": torch.ones(3)}),
        "row 1 has -2": lambda: pyramid_clip_loss(x, scale(), weight=torch.tensor([1.0, -2, 0, 0])),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# ----------------------------------------------------------------------------- ranks

SPLITS = {1: [N], 2: [20, 11], 3: [13, 0, 18]}


def on_a_rank(rank: int, world: int) -> list[dict[str, torch.Tensor]]:
    counts = SPLITS[world]
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    found = []
    for case in CASES.values():
        rows = {k: v[own] for k, v in case.items() if isinstance(v, torch.Tensor)}
        if "present" in case:
            rows["present"] = {k: v[own] for k, v in case["present"].items()}
        x = {k: f[own] for k, f in features().items()}
        found.append(grads(pyramid_clip_loss, x, scale(), tile=4, **{**case, **rows}))
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_mean_over_ranks_is_the_gradient_of_the_global_mean(world):
    ranks = run_ranks(on_a_rank, world)
    for i, case in enumerate(CASES.values()):
        wanted = grads(plain, features(), scale(), **case)
        assert all(float(rank[i]["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-12) for rank in ranks)
        found = {name: torch.cat([rank[i][name] for rank in ranks]) / world for name in NAMES}
        found |= {"loss": ranks[0][i]["loss"], "scale": sum(rank[i]["scale"] for rank in ranks) / world}
        assert_same(found, wanted)
