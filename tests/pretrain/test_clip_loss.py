"""clip_loss and contrastive_grads against the plain dense formula, in one process and over gloo ranks."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.distributed.groups import LOCAL
from pretrain.objectives.functional import clip_loss, contrastive_grads, tiles
from tests.ranks import run_ranks


def features(n: int, d: int = 16, seed: int = 0, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Two (n, d) sides of unit rows whose pairs lean towards each other."""
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(n, d, generator=g, dtype=torch.float64)
    text = 0.5 * image + torch.randn(n, d, generator=g, dtype=torch.float64)
    return F.normalize(image, dim=1).to(dtype), F.normalize(text, dim=1).to(dtype)


def dense(image, text, logit_scale, ids=None, weight=None, smoothing=0.0) -> torch.Tensor:
    """The definition, with torch's own cross_entropy, one query at a time."""
    weight = torch.ones(len(image), dtype=image.dtype) if weight is None else weight
    ids = torch.arange(len(image)) if ids is None else ids
    scores = logit_scale.exp() * image @ text.T
    total = image.new_zeros(())
    for i in range(len(image)):
        candidates = (ids != ids[i]) & (weight > 0)
        candidates[i] = True
        target = candidates[:i].sum()
        if weight[i] > 0:
            for row in (scores[i], scores[:, i]):
                loss = F.cross_entropy(row[candidates][None], target[None], label_smoothing=smoothing)
                total = total + weight[i] * loss
    return total / (2 * weight.sum())


def dense_grads(image, text, logit_scale, **options) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (image, text, logit_scale)]
    loss = dense(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def autograd_grads(image, text, logit_scale, **options) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (image, text, logit_scale)]
    loss = clip_loss(*leaves, **options)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(found, wanted, rtol: float = 1e-12) -> None:
    """Relative error of each tensor as a whole."""
    for name, a, b in zip(("loss", "d_image", "d_text", "d_logit_scale"), found, wanted):
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-3)
        assert a.shape == b.shape, name
        assert error <= rtol, f"{name}: relative error {error:.2e}"


def log_scale(scale: float, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor([math.log(scale)], dtype=dtype)


IDS = torch.arange(53) % 40  # 13 pairs of equal id
IDS[50:] = 7
WEIGHT = (torch.arange(53) % 5 != 2).double()
FRACTIONS = WEIGHT * (1 + torch.arange(53) % 3).double()
CASES = {
    "plain": {},
    "ids": {"ids": IDS},
    "weight": {"weight": WEIGHT},
    "fractions": {"weight": FRACTIONS},
    "smoothing": {"smoothing": 0.1},
    "all": {"ids": IDS, "weight": FRACTIONS, "smoothing": 0.2},
}


@pytest.fixture(params=["one shift", "own maxima"])
def way(request, monkeypatch) -> str:
    """Both ways of `tiles.normalise`, whatever the scores."""
    if request.param == "own maxima":
        monkeypatch.setattr(tiles, "EXPONENTS", {torch.float32: (-1.0, 0.0), torch.float64: (-1.0, 0.0)})
    return request.param


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_value_and_gradients_are_those_of_the_dense_formula(case, scale, way):
    image, text = features(53)
    wanted = dense_grads(image, text, log_scale(scale), **CASES[case])
    for tile in (1, 8, 16, 53, 1000):
        found = contrastive_grads(image, text, log_scale(scale), tile=tile, group=LOCAL, **CASES[case])
        assert_same(found, wanted)


@pytest.mark.parametrize("case", CASES)
def test_autograd_and_closed_form_are_one(case):
    image, text = features(53)
    found = autograd_grads(image, text, log_scale(14.3), tile=16, **CASES[case])
    again = contrastive_grads(image, text, log_scale(14.3), tile=16, **CASES[case])
    assert all(torch.equal(a, b) for a, b in zip(found, again))


def test_gradcheck():
    image, text = features(9, 4)
    leaves = [x.requires_grad_() for x in (image, text, log_scale(14.3))]
    ids, weight = torch.tensor([0, 1, 2, 3, 3, 4, 5, 5, 5]), torch.tensor([1.0, 1, 0, 1, 1, 2, 1, 1, 1])
    options = {"ids": ids, "weight": weight.double(), "smoothing": 0.1, "tile": 4}
    assert torch.autograd.gradcheck(lambda *x: 3 * clip_loss(*x, **options), leaves)


def test_double_backward_is_refused():
    image, text = features(5)
    image.requires_grad_()
    loss = clip_loss(image, text, log_scale(10.0))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, image, create_graph=True)


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_equals_open_clip(scale):
    from open_clip.loss import ClipLoss

    image, text = (x.requires_grad_() for x in features(200, 32))
    logit_scale = log_scale(scale).requires_grad_()
    loss = ClipLoss()(image, text, logit_scale.exp())
    wanted = [loss.detach(), *torch.autograd.grad(loss, (image, text, logit_scale))]
    assert_same(contrastive_grads(image, text, logit_scale, tile=64), wanted)


@pytest.mark.parametrize("scale", [14.3, 60.0, 100.0, 3000.0])
def test_float32_is_near_float64(scale):
    image, text = features(203, 64)
    wanted = dense_grads(image, text, log_scale(scale))
    found = contrastive_grads(image.float(), text.float(), log_scale(scale, torch.float32), tile=32)
    # rounding a score of size `scale` to float32 is an error of scale · 6e-8 in every exponent
    assert_same(found, wanted, rtol=max(2e-6, scale * 3e-7))


def test_scores_far_below_the_shift_are_not_lost():
    """Every cosine is -0.9, so exp(score - shift) underflows at scale 100 and 120."""
    image, text = torch.zeros(40, 8), torch.zeros(40, 8)
    image[:, 0], text[:, 0] = 1.0, -0.9
    text += 1e-3 * features(40, 8, dtype=torch.float32)[1]
    for scale in (80.0, 100.0, 120.0):
        wanted = dense_grads(image.double(), text.double(), log_scale(scale))
        found = contrastive_grads(image, text, log_scale(scale, torch.float32), tile=16)
        assert_same(found[:1], wanted[:1], 1e-4)
        assert_same(found[:3], wanted[:3], 1e-2)  # what is left of the texts' large common part


@pytest.mark.parametrize("scale", [14.3, 100.0, 1e4])
def test_identical_features_do_not_overflow(scale):
    same = F.normalize(torch.ones(64, 8), dim=1)
    loss, *gradients = contrastive_grads(same, same, log_scale(scale, torch.float32), tile=16)
    assert loss.item() == pytest.approx(math.log(64), rel=1e-3 if scale > 100 else 1e-5)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_features_are_scored_in_float32(dtype):
    image, text = features(53, dtype=dtype)
    wanted = contrastive_grads(image.float(), text.float(), log_scale(100.0, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = autograd_grads(image, text, log_scale(100.0, torch.float32))
    assert [x.dtype for x in found] == [torch.float32, dtype, dtype, torch.float32]
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found[1:], wanted[1:]))


def test_autocast_does_not_reach_inside():
    image, text = features(53, dtype=torch.float32)
    wanted = autograd_grads(image, text, log_scale(100.0, torch.float32), smoothing=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = autograd_grads(image, text, log_scale(100.0, torch.float32), smoothing=0.1)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_nan_in_a_row_of_weight_zero_reaches_nothing():
    image, text = features(53)
    wanted = contrastive_grads(image, text, log_scale(14.3), weight=WEIGHT, tile=8)
    image[2], text[7] = math.nan, math.inf
    found = contrastive_grads(image, text, log_scale(14.3), weight=WEIGHT, tile=8)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    assert found[1][2].eq(0).all()
    assert found[2][7].eq(0).all()


def test_nan_in_a_row_that_counts_shows():
    image, text = features(53)
    image[3] = math.nan
    assert clip_loss(image, text, log_scale(14.3)).isnan()


@pytest.mark.parametrize(("n", "weight"), [(0, None), (0, []), (3, [0.0, 0.0, 0.0])])
def test_nothing_to_compare_is_zero(n, weight):
    weight = None if weight is None else torch.tensor(weight)
    found = autograd_grads(*features(n), log_scale(14.3), weight=weight, smoothing=0.1)
    assert all(x.eq(0).all() for x in found)


def test_one_pair_is_zero():
    found = autograd_grads(*features(1), log_scale(100.0), smoothing=0.1)
    assert all(x.abs().max() < 1e-12 for x in found)


def test_pairs_of_one_id_are_zero():
    found = contrastive_grads(*features(20), log_scale(100.0), ids=torch.zeros(20, dtype=torch.int64), tile=8)
    assert all(x.abs().max() < 1e-12 for x in found)


def test_wrong_arguments_are_named():
    image, text = features(4)
    for message, call in {
        r"\(4, 16\) and \(3, 16\)": lambda: clip_loss(image, text[:3], log_scale(1.0)),
        "ids must be one a pair": lambda: clip_loss(image, text, log_scale(1.0), ids=torch.arange(3)),
        "row 1 has -2": lambda: clip_loss(image, text, log_scale(1.0), weight=torch.tensor([1.0, -2, 0, 0])),
        "smoothing": lambda: clip_loss(image, text, log_scale(1.0), smoothing=1.0),
        "tile": lambda: clip_loss(image, text, log_scale(1.0), tile=0),
        "one number": lambda: clip_loss(image, text, torch.zeros(2)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# ----------------------------------------------------------------------------- memory


def kept_bytes(n: int) -> int:
    image, text = (x.requires_grad_() for x in features(n, 32, dtype=torch.float32))
    kept: dict[int, int] = {}

    def pack(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = clip_loss(image, text, log_scale(14.3, torch.float32), tile=64)
    assert loss.requires_grad
    return sum(kept.values())


class LiveBytes(TorchDispatchMode):
    """The peak of bytes in storages made within, counted from the birth to the death of each."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.live:
                storage = t.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def peak_bytes(n: int) -> int:
    image, text = features(n, 32, dtype=torch.float32)
    with LiveBytes() as live:
        contrastive_grads(image, text, log_scale(14.3, torch.float32), tile=64, ids=torch.arange(n) // 2)
    return live.peak


@pytest.mark.parametrize("count", [kept_bytes, peak_bytes])
def test_memory_is_linear_in_the_batch(count):
    small, large = count(1024), count(2048)
    assert small >= 2 * 1024 * 32 * 4  # the features themselves: the count sees something
    assert large / small <= 2.1
    assert large < 2048 * 2048 * 4


# ----------------------------------------------------------------------------- ranks


def share(rank: int, counts: list[int], *tensors):
    start = sum(counts[:rank])
    return [None if t is None else t[start : start + counts[rank]] for t in tensors]


def one_rank(rank: int, world: int, counts: list[int], scale: float, case: str, grads: bool):
    options = dict(CASES[case])
    image, text = features(53)
    image, text, ids, weight = share(rank, counts, image, text, options.pop("ids", None), options.pop("weight", None))
    call = contrastive_grads if grads else autograd_grads
    return call(image, text, log_scale(scale), ids=ids, weight=weight, tile=8, **options)


SPLITS = {1: [53], 2: [30, 23], 3: [20, 0, 33]}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_mean_over_ranks_is_the_gradient_of_the_global_mean(world):
    results = run_ranks(many, world, SPLITS[world])
    for i, (case, scale, _) in enumerate(CALLS):
        per_rank = [r[i] for r in results]
        wanted = dense_grads(*features(53), log_scale(scale), **CASES[case])
        # what DDP makes of it: parameters behind a row see that rank's gradient / W; the temperature the mean
        d_image, d_text = (torch.cat([r[k] for r in per_rank]) / world for k in (1, 2))
        d_scale = torch.stack([r[3] for r in per_rank]).mean(0)
        for r in per_rank:
            assert_same([r[0], d_image, d_text, d_scale], wanted)


CALLS = [(case, scale, grads) for case in CASES for scale, grads in ((14.3, True), (100.0, False))]


def many(rank: int, world: int, counts: list[int]):
    return [one_rank(rank, world, counts, scale, case, grads) for case, scale, grads in CALLS]


def empty_everywhere(rank: int, world: int):
    weight = torch.zeros(3) if rank == 0 else torch.zeros(0)
    return autograd_grads(*features(len(weight)), log_scale(14.3), weight=weight)


def no_communication(rank: int, world: int):
    image, text = features(5 + rank)
    return [clip_loss(image, text, log_scale(14.3), group=LOCAL), dense(image, text, log_scale(14.3))]


def test_ranks_without_a_pair_get_zero():
    for found in run_ranks(empty_everywhere, 2):
        assert all(x.eq(0).all() for x in found)


def test_local_never_communicates():
    for found, wanted in run_ranks(no_communication, 2):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
