"""siglip_loss against the plain dense formula and open_clip's, in one process and over gloo ranks."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.distributed.groups import LOCAL
from pretrain.objectives.functional import siglip_loss
from tests.pretrain.test_clip_loss import FRACTIONS, IDS, SPLITS, WEIGHT, features, log_scale, share
from tests.ranks import run_ranks

NAMES = ("loss", "d_image", "d_text", "d_logit_scale", "d_logit_bias")
CASES = {
    "plain": {},
    "ids": {"ids": IDS},
    "weight": {"weight": WEIGHT},
    "fractions": {"weight": FRACTIONS / 3},
    "all": {"ids": IDS, "weight": FRACTIONS},
}
TEMPERATURES = [(10.0, -10.0), (10.0, 0.3), (100.0, -10.0), (100.0, 10.0)]


def dense(image, text, logit_scale, logit_bias, ids=None, weight=None) -> torch.Tensor:
    """The definition, all N² answers at once."""
    weight = torch.ones(len(image), dtype=image.dtype) if weight is None else weight
    ids = torch.arange(len(image)) if ids is None else ids
    pair = torch.eye(len(image), dtype=torch.bool)
    y = 2.0 * pair - 1
    answers = F.logsigmoid(y * (logit_scale.exp() * image @ text.T + logit_bias))
    counts = torch.where(pair, weight, torch.outer(weight, weight) * (ids[:, None] != ids))
    return -(counts * answers).sum() / weight.sum()


def grads(loss, image, text, logit_scale, logit_bias, **options) -> list[torch.Tensor]:
    """The value, and its gradient for everything that carries one."""
    leaves = [x.detach().clone().requires_grad_() for x in (image, text, logit_scale, logit_bias)]
    value = loss(*leaves, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def inputs(scale: float, bias: float, dtype=torch.float64, n: int = 53, d: int = 16) -> list[torch.Tensor]:
    return [*features(n, d, dtype=dtype), log_scale(scale, dtype), torch.tensor([bias], dtype=dtype)]


def assert_same(found, wanted, rtol: float = 1e-12) -> None:
    """Relative error of each tensor as a whole."""
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-3)
        assert a.shape == b.shape, name
        assert error <= rtol, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("scale", "bias"), TEMPERATURES)
def test_value_and_gradients_are_those_of_the_dense_formula(case, scale, bias):
    wanted = grads(dense, *inputs(scale, bias), **CASES[case])
    for tile in (1, 8, 53, 1000):
        assert_same(grads(siglip_loss, *inputs(scale, bias), tile=tile, group=LOCAL, **CASES[case]), wanted)


@pytest.mark.parametrize(("scale", "bias"), TEMPERATURES)
def test_equals_open_clip(scale, bias):
    from open_clip.loss import SigLipLoss

    def peer(image, text, logit_scale, logit_bias):
        return SigLipLoss()(image, text, logit_scale.exp(), logit_bias)

    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        given = inputs(scale, bias, dtype, n=200, d=32)
        assert_same(grads(siglip_loss, *given, tile=64), grads(peer, *given), bound)


def test_gradcheck():
    leaves = [x.requires_grad_() for x in inputs(10.0, -2.0, n=9, d=4)]
    ids, weight = torch.tensor([0, 1, 2, 3, 3, 4, 5, 5, 5]), torch.tensor([1.0, 1, 0, 1, 1, 2, 0.5, 1, 1])
    options = {"ids": ids, "weight": weight.double(), "tile": 4}
    assert torch.autograd.gradcheck(lambda *x: 3 * siglip_loss(*x, **options), leaves)


def test_double_backward_is_refused():
    leaves = [x.requires_grad_() for x in inputs(10.0, -10.0, n=5)]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(siglip_loss(*leaves), leaves, create_graph=True)


def test_a_weight_of_two_is_two_copies_under_one_id():
    image, text, *temperature = inputs(10.0, -2.0)
    weight = 1.0 + torch.arange(53, dtype=torch.float64) % 3
    copies = torch.arange(53).repeat_interleave(weight.long())
    found = grads(siglip_loss, image, text, *temperature, weight=weight)
    loss, d_image, d_text, *d_temperature = grads(siglip_loss, image[copies], text[copies], *temperature, ids=copies)
    summed = [torch.zeros_like(image).index_add_(0, copies, d) for d in (d_image, d_text)]
    assert_same(found, [loss, *summed, *d_temperature])


@pytest.mark.parametrize("scale", [10.0, 100.0, 1e4])
def test_float32_is_near_float64(scale):
    given = inputs(scale, -10.0, torch.float32, n=203, d=64)
    wanted = grads(dense, *(x.double() for x in given))
    # rounding a score of size `scale` to float32 is an error of scale · 6e-8 in every exponent
    assert_same(grads(siglip_loss, *given, tile=32), wanted, rtol=max(2e-6, scale * 3e-7))


def test_scores_far_off_do_not_overflow():
    """A thousand logits off: what is wrong costs its logit, what is right nothing."""
    same = F.normalize(torch.ones(64, 8), dim=1)
    found = grads(siglip_loss, same, same, log_scale(1e3, torch.float32), torch.zeros(1), tile=16)
    assert found[0].item() == pytest.approx(63e3, rel=1e-5)
    assert all(x.isfinite().all() for x in found)
    apart = grads(siglip_loss, same, -same, log_scale(1e3, torch.float32), torch.zeros(1), tile=16)
    assert apart[0].item() == pytest.approx(1e3, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_features_are_scored_in_float32(dtype):
    image, text, *temperature = inputs(100.0, -10.0, torch.float32)
    image, text = image.to(dtype), text.to(dtype)
    wanted = grads(siglip_loss, image.float(), text.float(), *temperature)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = grads(siglip_loss, image, text, *temperature)
    assert [x.dtype for x in found] == [torch.float32, dtype, dtype, torch.float32, torch.float32]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, wanted))


def test_nan_in_a_row_of_weight_zero_reaches_nothing():
    image, text, *temperature = inputs(10.0, -10.0)
    wanted = grads(siglip_loss, image, text, *temperature, weight=WEIGHT, tile=8)
    image[2], text[7] = math.nan, math.inf
    found = grads(siglip_loss, image, text, *temperature, weight=WEIGHT, tile=8)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    assert found[1][2].eq(0).all()
    assert found[2][7].eq(0).all()


def test_nan_in_a_row_that_counts_shows():
    image, *others = inputs(10.0, -10.0)
    image[3] = math.nan
    assert siglip_loss(image, *others).isnan()


@pytest.mark.parametrize(("n", "weight"), [(0, None), (0, []), (3, [0.0, 0.0, 0.0])])
def test_nothing_to_compare_is_zero(n, weight):
    weight = None if weight is None else torch.tensor(weight)
    assert all(x.eq(0).all() for x in grads(siglip_loss, *inputs(10.0, -10.0, n=n), weight=weight))


def test_one_pair_is_one_question():
    image, text, *temperature = inputs(10.0, -10.0, n=1)
    expected = F.softplus(10.0 - 10.0 * (image * text).sum())
    torch.testing.assert_close(siglip_loss(image, text, *temperature), expected, rtol=1e-12, atol=0)


def test_wrong_arguments_are_named():
    image, text, *t = inputs(10.0, -10.0, n=4)
    for message, call in {
        r"\(4, 16\) and \(3, 16\)": lambda: siglip_loss(image, text[:3], *t),
        "ids must be one a pair": lambda: siglip_loss(image, text, *t, ids=torch.arange(3)),
        "row 1 has -2": lambda: siglip_loss(image, text, *t, weight=torch.tensor([1.0, -2, 0, 0])),
        "tile": lambda: siglip_loss(image, text, *t, tile=0),
        "logit_scale must be one number": lambda: siglip_loss(image, text, torch.zeros(2), t[1]),
        "logit_bias must be one number": lambda: siglip_loss(image, text, t[0], torch.zeros(2)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# ----------------------------------------------------------------------------- memory and work


def kept_bytes(n: int, d: int) -> int:
    """Bytes kept between forward and backward, each storage once."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    leaves = [x.requires_grad_() for x in inputs(10.0, -10.0, torch.float32, n, d)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = siglip_loss(*leaves)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_no_more_is_kept_than_the_gradients():
    for n in (512, 2048):
        features_bytes = 2 * n * 32 * 4
        assert features_bytes <= kept_bytes(n, 32) <= 1.01 * features_bytes


class Products(TorchDispatchMode):
    """How often each matrix product was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))


def products(*trained: bool, graph: bool = True) -> int:
    leaves = [x.requires_grad_(need) for x, need in zip(inputs(10.0, -10.0), trained)]
    with Products() as seen, torch.set_grad_enabled(graph):
        siglip_loss(*leaves, tile=32)
    return seen.count[torch.ops.aten.addmm] + seen.count[torch.ops.aten.addmm_]


def test_only_what_is_wanted_is_computed():
    """53 pairs are four tiles of 32: one product a tile for the loss, one more for each side's gradient."""
    assert products(True, True, True, True) == 12
    assert products(True, True, True, True, graph=False) == 4
    assert products(False, False, False, False) == 4
    assert products(False, True, False, True) == 8
    for k, name in enumerate(NAMES[1:]):
        leaves = [x.requires_grad_(i == k) for i, x in enumerate(inputs(10.0, -10.0))]
        (found,) = torch.autograd.grad(siglip_loss(*leaves), leaves[k])
        torch.testing.assert_close(found, grads(dense, *inputs(10.0, -10.0))[1 + k], rtol=1e-11, atol=0, msg=name)


# ----------------------------------------------------------------------------- ranks

CALLS = [(case, scale, bias) for case in CASES for scale, bias in ((10.0, -10.0), (100.0, 10.0))]


def many(rank: int, world: int, counts: list[int]) -> list:
    return [one_rank(rank, counts, *call) for call in CALLS]


def one_rank(rank: int, counts: list[int], case: str, scale: float, bias: float) -> list:
    options = dict(CASES[case])
    image, text, *temperature = inputs(scale, bias)
    image, text, ids, weight = share(rank, counts, image, text, options.get("ids"), options.get("weight"))
    return grads(siglip_loss, image, text, *temperature, ids=ids, weight=weight, tile=8)


@pytest.mark.parametrize("world", [2, 3])
def test_mean_over_ranks_is_the_gradient_of_the_global_mean(world):
    results = run_ranks(many, world, SPLITS[world])
    for i, (case, scale, bias) in enumerate(CALLS):
        per_rank = [r[i] for r in results]
        wanted = grads(dense, *inputs(scale, bias), **CASES[case])
        # what DDP makes of it: parameters behind a row see that rank's gradient / W; the temperature the mean
        rows = [torch.cat([r[k] for r in per_rank]) / world for k in (1, 2)]
        numbers = [torch.stack([r[k] for r in per_rank]).mean(0) for k in (3, 4)]
        for r in per_rank:
            assert_same([r[0], *rows, *numbers], wanted)


def empty_everywhere(rank: int, world: int) -> list:
    weight = torch.zeros(3) if rank == 0 else torch.zeros(0)
    return grads(siglip_loss, *inputs(10.0, -10.0, n=len(weight)), weight=weight)


def no_communication(rank: int, world: int) -> list:
    given = inputs(10.0, -10.0, n=5 + rank)
    return [siglip_loss(*given, group=LOCAL), dense(*given)]


def test_ranks_without_a_pair_get_zero():
    for found in run_ranks(empty_everywhere, 2):
        assert all(x.eq(0).all() for x in found)


def test_local_never_communicates():
    for found, wanted in run_ranks(no_communication, 2):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
