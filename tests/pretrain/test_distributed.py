"""Groups, collectives, sharded evaluation and SyncBatchNorm, on real gloo ranks."""

from __future__ import annotations

import copy
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pretrain.distributed.collectives import (
    all_gather_rows,
    all_reduce_max,
    all_reduce_sum,
    reduce_scatter_rows,
    row_counts,
)
from pretrain.distributed.evaluation import gather_rows, shard_rows
from pretrain.distributed.flags import SharedFlags
from pretrain.distributed.groups import LOCAL, resolve
from pretrain.distributed.syncbn import SyncBatchNorm, convert, frozen_statistics
from tests.ranks import run_ranks
from tests.runs import LAUNCH


def rows_of(rank: int, n: int) -> torch.Tensor:
    return 100 * rank + torch.arange(2 * n, dtype=torch.float64).view(n, 2)


# ----------------------------------------------------------------------------- flags, a lost rank


def flags(rank: int, world: int):
    shared = SharedFlags(("stop", "other"), world)
    return [sorted(shared.exchange({"stop"} if rank == 1 and step >= 2 else set())) for step in range(5)]


def test_a_flag_of_one_rank_reaches_all_at_the_same_step():
    assert run_ranks(flags, 3) == [[[], [], [], ["stop"], ["stop"]]] * 3
    alone = SharedFlags(("stop",), 1)
    assert [alone.exchange({"stop"}), alone.exchange(set()), alone.exchange(set())] == [set(), {"stop"}, set()]


LEFT_ALONE = """
import torch, torch.distributed as dist
from pretrain.distributed.process import process_group
from pretrain.errors import UserError
try:
    with process_group() as process:
        dist.barrier()
        if process.rank == 1:
            raise UserError("the disk is full")
        dist.all_reduce(torch.ones(1))
except UserError as error:
    raise SystemExit(f"rank {process.rank}: {error}")
"""


def test_a_rank_left_alone_says_so_in_a_line():
    done = subprocess.run([sys.executable, "-c", LAUNCH, LEFT_ALONE], capture_output=True, text=True)
    assert done.returncode == 1
    told = done.stderr
    assert re.search(r"rank 0: rank 0 on \S+: it lost another rank, which ended first", told)
    assert "rank 1: the disk is full" in told
    assert "Traceback" not in told


# ----------------------------------------------------------------------------- groups and collectives


def test_one_process_resolves_to_nobody():
    assert resolve() == resolve(LOCAL) == (None, 0, 1)
    assert copy.deepcopy(LOCAL) is LOCAL


def groups(rank: int, world: int):
    pair = dist.new_group([0, 2])
    found = [resolve()[1:], resolve(LOCAL)[1:]]
    try:
        found.append(resolve(pair)[1:])
        found.append(all_gather_rows(torch.tensor([rank]), pair).tolist())
    except ValueError as error:
        found += [str(error), []]
    return found


def test_groups():
    zero, one, two = run_ranks(groups, 3)
    assert zero == [(0, 3), (0, 1), (0, 2), [0, 2]]
    assert two == [(2, 3), (0, 1), (1, 2), [0, 2]]
    assert one[:2] == [(1, 3), (0, 1)]
    assert "rank 1 of the default group is not a member" in one[2]


def collectives(rank: int, world: int):
    found = []
    for counts in ([2, 2, 2], [3, 0, 1], [0, 0, 0]):
        x = rows_of(rank, counts[rank])
        gathered = all_gather_rows(x.requires_grad_())
        again = all_gather_rows(x.to(torch.bfloat16), None, counts[:world])
        scattered = reduce_scatter_rows((rank + 1) * gathered, counts[:world])
        found.append([row_counts(len(x), x.device), gathered, again, scattered, gathered.requires_grad])
    total, highest = torch.tensor([1.0 * rank]), torch.tensor([1.0 * rank])
    return found, all_reduce_sum(total), all_reduce_max(highest), all_reduce_sum(torch.ones(3), LOCAL)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_rows_of_all_ranks_in_order(world):
    for rank, (found, total, highest, alone) in enumerate(run_ranks(collectives, world)):
        for counts, result in zip(([2, 2, 2], [3, 0, 1], [0, 0, 0]), found):
            everyone = torch.cat([rows_of(r, n) for r, n in enumerate(counts[:world])])
            scattered = everyone.split(counts[:world])[rank] * (world * (world + 1) / 2)
            assert result[0] == counts[:world]
            assert torch.equal(result[1], everyone)
            assert torch.equal(result[2], everyone.to(torch.bfloat16))
            assert torch.equal(result[3], scattered)
            assert result[4] is False
        assert total.item() == sum(range(world))
        assert highest.item() == world - 1
        assert torch.equal(alone, torch.ones(3))


def wrong_counts(rank: int, world: int):
    try:
        all_gather_rows(torch.zeros(2, 1), None, [3, 3])
    except ValueError as error:
        return str(error)
    return "passed"


def test_wrong_counts_are_named():
    for rank, message in enumerate(run_ranks(wrong_counts, 2)):
        assert message == f"rank {rank} of 2 holds 2 rows, but the row counts given are [3, 3]"
    with pytest.raises(ValueError, match="add up to 3"):
        reduce_scatter_rows(torch.zeros(4, 1), [3])


# ----------------------------------------------------------------------------- evaluation


def evaluated(rank: int, world: int):
    found = []
    for n in (0, 1, 2, 7):
        lo, hi = shard_rows(n)
        found.append([lo, hi, gather_rows(torch.arange(lo, hi).view(-1, 1).expand(-1, 3), n)])
    try:
        gather_rows(torch.zeros(9), 7)
    except ValueError as error:
        found.append(str(error))
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_cover_all_rows_and_come_back_in_order(world):
    results = run_ranks(evaluated, world)
    for i, n in enumerate((0, 1, 2, 7)):
        assert [row for r in results for row in range(r[i][0], r[i][1])] == list(range(n))
        for r in results:
            assert torch.equal(r[i][2], torch.arange(n).view(-1, 1).expand(-1, 3))
            assert r[i][1] - r[i][0] in (n // world, n // world + 1)
    assert all("holds 9 rows, but its share of 7 is" in r[-1] for r in results)


# ----------------------------------------------------------------------------- SyncBatchNorm


SHAPES = {"1d": (13, 4), "3": (13, 4, 5), "2d": (13, 4, 3, 5)}
COUNTS = {1: [13], 2: [9, 4], 3: [6, 0, 7]}


def batch(shape: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs far from zero mean, and the gradient of a mean over the 13 rows."""
    g = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(SHAPES[shape], generator=g, dtype=torch.float64)
    return x, torch.randn(SHAPES[shape], generator=g, dtype=torch.float64) / 13


def norm(shape: str, affine: bool = True, momentum: float | None = 0.1) -> nn.Module:
    kind = nn.BatchNorm2d if shape == "2d" else nn.BatchNorm1d
    module = kind(4, momentum=momentum, affine=affine).double()
    for i, p in enumerate(module.parameters()):
        p.data += torch.linspace(0, 0.5 + i, 4)
    return module


def trained(module: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """Two training steps and an evaluation: output, d_x, parameters' gradients, buffers, evaluated output."""
    module(x + 1)
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(gradient)
    grads = [p.grad for p in module.parameters()]
    buffers = [b.clone() for b in module.buffers()]
    return [y.detach(), x.grad, *grads, *buffers, module.eval()(x).detach()]


OPTIONS = [(shape, affine, momentum) for shape in SHAPES for affine, momentum in ((True, 0.1), (False, None))]


def synchronised(rank: int, world: int):
    found = []
    for shape, affine, momentum in OPTIONS:
        x, gradient = (t.split(COUNTS[world])[rank] for t in batch(shape))
        # the convention of all losses: each rank hands back W × its share of the global mean
        found.append(trained(convert(norm(shape, affine, momentum)), x, world * gradient))
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
def test_syncbn_is_batchnorm_over_the_global_batch(world):
    results = run_ranks(synchronised, world)
    for i, (shape, affine, momentum) in enumerate(OPTIONS):
        wanted = trained(norm(shape, affine, momentum), *batch(shape))
        per_rank = [r[i] for r in results]
        n_grads = 2 if affine else 0
        found = [torch.cat([r[0] for r in per_rank]), torch.cat([r[1] for r in per_rank]) / world]
        found += [torch.stack([r[2 + k] for r in per_rank]).mean(0) for k in range(n_grads)]
        for r in per_rank:
            everything = [*found, *r[2 + n_grads : -1], torch.cat([q[-1] for q in per_rank])]
            for a, b in zip(everything, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_syncbn_gradcheck():
    x, _ = batch("2d")
    module = convert(norm("2d"))
    leaves = [x[:5].requires_grad_(), module.weight, module.bias]
    assert torch.autograd.gradcheck(lambda *_: module(leaves[0]).sin(), leaves)


def test_syncbn_keeps_statistics_in_float32_for_bfloat16():
    g = torch.Generator().manual_seed(0)
    x = (100 + torch.randn(4096, 4, generator=g)).bfloat16()  # a bf16 mean would be off by up to 0.5
    synced, plain = convert(nn.BatchNorm1d(4)), nn.BatchNorm1d(4)
    y = synced(x)
    wanted = plain(x.float())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(synced.running_var, plain.running_var, rtol=1e-4, atol=0)


def test_syncbn_large_mean_small_variance():
    x = 1000 + 0.01 * torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    wanted = nn.BatchNorm1d(4, eps=1e-9).double()(x.double()).float()
    torch.testing.assert_close(convert(nn.BatchNorm1d(4, eps=1e-9))(x), wanted, rtol=1e-2, atol=1e-2)


def test_second_forward_leaves_the_statistics():
    x, _ = batch("2d")
    model = nn.Sequential(convert(norm("2d")), norm("2d", momentum=None), norm("2d"))
    first = model(x)
    before = [b.clone() for b in model.buffers()]
    with frozen_statistics(model):
        second = model(x)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    model(x.square())
    assert not any(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_convert_keeps_parameters_buffers_and_timms_activation():
    from timm.layers import BatchNormAct2d

    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=nn.Dropout), nn.BatchNorm2d(4)
    )
    model.train()[2].eval()
    reference = copy.deepcopy(model)
    converted = convert(model, LOCAL)
    x = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert converted is model
    assert all(isinstance(model[i], SyncBatchNorm) for i in (1, 2))
    assert model[1].training
    assert not model[2].training
    assert list(model.state_dict()) == list(reference.state_dict())
    torch.manual_seed(0)
    found = copy.deepcopy(convert(model))(x)
    torch.manual_seed(0)
    torch.testing.assert_close(found, reference(x))


def test_convert_keeps_the_same_parameter_objects():
    old = nn.BatchNorm1d(4)
    weight, mean = old.weight, old.running_mean
    new = convert(old)
    assert new.weight is weight
    assert new.running_mean is mean


def test_convert_refuses_what_it_does_not_know():
    class Odd(nn.BatchNorm1d):
        pass

    with pytest.raises(TypeError, match="Odd"):
        convert(nn.Sequential(Odd(3)))


def test_syncbn_names_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"\(B, 4\).*\(3, 5\)"):
        SyncBatchNorm(4)(torch.zeros(3, 5))
    x = torch.randn(3, 4, requires_grad=True)
    y = SyncBatchNorm(4)(x).sin().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y, x, create_graph=True)


def test_syncbn_without_running_statistics():
    x, _ = batch("1d")
    module = convert(nn.BatchNorm1d(4, track_running_stats=False).double()).eval()
    torch.testing.assert_close(module(x), nn.functional.batch_norm(x, None, None, training=True))
