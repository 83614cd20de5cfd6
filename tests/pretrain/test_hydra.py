"""The objective Hydra around its loss: gates, pseudo-labels, labels that do not fit, the same figures on all ranks."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from pretrain.distributed.syncbn import convert
from pretrain.errors import UserError
from pretrain.objectives import build
from pretrain.objectives.base import RunFacts
from pretrain.objectives.functional import hydra_partners
from pretrain.objectives.hydra import Hydra
from pretrain.objectives.pieces.clusters import OnlineClusters
from pretrain.objectives.pieces.gates import Gates
from pretrain.reader import Batch
from tests.ranks import run_ranks

ROWS, WIDTH, CLASSES = 24, 10, 5
SMALL = {"hidden": 12, "dim": 8, "gate_width": 6, "gate_hidden": 7}


def hydra(rank: int = 0, world: int = 1, **options) -> Hydra:
    facts = RunFacts(
        pooled_dim=WIDTH, global_batch=ROWS, total_steps=100, samples=200, seed=4, rank=rank, world=world
    )  # fmt: skip
    (made,) = build({"hydra": {**SMALL, **options}}, facts).values()
    return (convert(made) if world > 1 else made).double()


def batch(rows: int = ROWS, step: int = 3, **changes) -> Batch:
    """Row 2 is damaged, row 5 has no label."""
    g = torch.Generator().manual_seed(step)
    labels = torch.randint(0, CLASSES, (rows,), generator=g)
    weight = torch.ones(rows)
    weight[2], labels[5] = 0, -1
    places = torch.arange(rows)
    given = {"labels": labels, "weight": weight, "keys": [f"s{i:03d}" for i in range(rows)]} | changes
    none = {"images": {}, "tokens": {}, "captions": {}}
    return Batch(step=step, ids=places, source=places * 0, epoch=places * 0, **none, **given)


def features(objective: Hydra, step: int = 3, rows: int = ROWS) -> dict:
    g = torch.Generator().manual_seed(100 + step)
    return {r: torch.randn(rows, WIDTH, generator=g, dtype=torch.float64) for r in objective.requests()}


# ----------------------------------------------------------------------------- ranks

CASES = {
    "labels": {"classes": CLASSES},
    "product": {"classes": CLASSES, "fuse": False, "form": "gated_dot", "gate_penalty": 0.3, "learn_temperature": True},
    "distinct": {"classes": CLASSES, "partners": "distinct", "gate": "open"},
    "pseudo-labels": {"pseudo_labels": 4},
}


def two_steps(rank: int, world: int, case: str) -> list[dict]:
    """Loss, signals, gradients (as DDP's mean would take them) and state of two steps."""
    objective = hydra(rank, world, **CASES[case])
    mine, found = slice(rank * ROWS // world, (rank + 1) * ROWS // world), []
    for step in (3, 4):
        own = {r: x[mine].clone().requires_grad_() for r, x in features(objective, step).items()}
        objective.zero_grad()
        result = objective.loss(own, batch(step=step).rows(mine.start, mine.stop), None)
        result.value.backward()
        signals = {n: torch.as_tensor(v).detach().double().reshape(()) for n, v in result.signals.items()}
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in objective.named_parameters()}
        backwards = torch.stack([x.grad for x in own.values()])
        found.append({"loss": result.value.detach(), "signals": signals, "gradients": gradients, "back": backwards,
                      "state": {n: t.clone() for n, t in objective.state_dict().items()}})  # fmt: skip
    return found


def all_cases(rank: int, world: int) -> dict:
    return {case: two_steps(rank, world, case) for case in CASES}


@pytest.mark.parametrize("world", [2, 3])
def test_losses_signals_and_gradients_are_the_same_at_any_world(world):
    ranks = run_ranks(all_cases, world)
    for case, steps in all_cases(0, 1).items():
        for i, wanted in enumerate(steps):
            found = [r[case][i] for r in ranks]
            for f in found:
                torch.testing.assert_close(f["loss"], wanted["loss"], rtol=1e-10, atol=1e-12)
                torch.testing.assert_close(f["signals"], wanted["signals"], rtol=1e-10, atol=1e-12)
                torch.testing.assert_close(f["state"], wanted["state"], rtol=1e-9, atol=1e-12)
            assert all(torch.equal(f["signals"][n], x) for f in found for n, x in found[0]["signals"].items()), case
            for name, gradient in wanted["gradients"].items():
                mean = torch.stack([f["gradients"][name] for f in found]).mean(0)
                torch.testing.assert_close(mean, gradient, rtol=1e-8, atol=1e-10, msg=f"{case} {name}")
            back = torch.cat([f["back"] for f in found], dim=1) / world
            torch.testing.assert_close(back, wanted["back"], rtol=1e-8, atol=1e-11)
            assert back[:, 2].abs().max() < back[:, 0].abs().max()  # a damaged row is felt through BatchNorm alone


def test_every_parameter_learns():
    for case in CASES:
        for step in two_steps(0, 1, case):
            silent = [n for n, g in step["gradients"].items() if not g.abs().max() > 0]
            assert not silent, case


# ----------------------------------------------------------------------------- labels


def refused(rank: int, world: int) -> dict[str, str]:
    """What each kind of wrong labels is told."""
    none, high = batch(step=0, labels=torch.full((ROWS,), -1)), batch()
    high.labels[-2] = 7  # on the last rank
    return {kind: message_of(whole, rank, world) for kind, whole in (("none", none), ("high", high))}


def message_of(whole: Batch, rank: int, world: int) -> str:
    objective = hydra(rank, world, classes=CLASSES)
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    own = {r: x[mine] for r, x in features(objective).items()}
    with pytest.raises(UserError) as error:
        objective.loss(own, whole.rows(mine.start, mine.stop), None)
    return str(error.value)


def test_labels_that_do_not_fit_are_refused_on_all_ranks():
    for told in run_ranks(refused, 2):
        for words in ("objectives.hydra.classes", ".cls", "pseudo_labels"):
            assert words in told["none"]
        for words in ("classes is 5", "sample s022 has label 7", "8 or more"):
            assert words in told["high"]


def test_a_batch_without_labels_later_on_is_no_loss():
    """Nor where it is the first that this process sees: a run resumed there."""
    objective = hydra(classes=CLASSES)
    later = objective.loss(features(objective), batch(labels=torch.full((ROWS,), -1)), None)
    assert later.value == 0
    assert all(torch.isfinite(torch.as_tensor(v)).all() for v in later.signals.values())


def test_all_rows_damaged_at_first_is_no_refusal():
    objective = hydra(classes=CLASSES)
    nothing = batch(weight=torch.zeros(ROWS), labels=torch.full((ROWS,), -1))
    assert objective.loss(features(objective), nothing, None).value == 0


@pytest.mark.parametrize("options", [{}, {"classes": 4, "pseudo_labels": 4}])
def test_one_kind_of_class_must_be_chosen(options):
    with pytest.raises(UserError, match=r"objectives\.hydra.*classes: N.*pseudo_labels: N"):
        hydra(**options)


# ----------------------------------------------------------------------------- what is reported


def test_sample_losses_are_the_shares_of_the_loss():
    objective = hydra(classes=ROWS)
    one_each = batch(labels=torch.arange(ROWS), weight=torch.ones(ROWS))  # one positive an anchor
    rows = objective.sample_losses(features(objective), one_each)
    value = objective.loss(features(objective), one_each, None).value
    torch.testing.assert_close(rows.mean(), value.detach())
    several = batch()
    labels = torch.where(several.weight > 0, several.labels, -1)
    partners = hydra_partners(labels, seed=4, step=3)
    positives = ((partners[:, None] == labels[None]) & (partners >= 0)[:, None]).sum(1)
    assert positives.max() > 2
    rows = objective.sample_losses(features(objective), several)
    assert rows[[2, 5]].eq(0).all()
    wanted = objective.loss(features(objective), several, None).value
    torch.testing.assert_close(rows.sum() / several.weight.sum(), wanted.detach())


def test_replay_remembers_nothing():
    objective = hydra(pseudo_labels=4).eval()
    before = {n: t.clone() for n, t in objective.state_dict().items()}
    objective.sample_losses(features(objective), batch())
    assert all(torch.equal(t, before[n]) for n, t in objective.state_dict().items())


def test_open_gates_are_the_control_without_gates():
    objective = hydra(classes=CLASSES, gate="open")
    signals = objective.loss(features(objective), batch(), None).signals
    assert not any("gates" in name for name, _ in objective.named_parameters())
    assert signals["activation"] == 8
    assert signals["gate_entropy"] == 0


def test_failures_are_named_with_what_to_do():
    objective = hydra(classes=CLASSES)
    sound = {"loss": 2.0, "chance": 3.0, "activation": 4.0, "gate_entropy": 0.5, "positives": 3.0, "no_positive": 0.0}
    assert objective.warnings(sound, 5000) == []
    for change, words in (
        ({"no_positive": 0.8}, "data.classes_per_batch"),
        ({"activation": 7.99}, "gates are open"),
        ({"activation": 0.01}, "gates are closed"),
        ({"loss": 3.0}, "equally alike"),
    ):
        (line,) = objective.warnings(sound | change, 5000)
        assert words in line


def test_pseudo_labels_are_called_so(caplog):
    objective = hydra(pseudo_labels=4)
    with caplog.at_level(logging.INFO):
        signals = [objective.loss(features(objective), batch(), None).signals for _ in range(2)]
    assert [("pseudo-labels" in r.message) for r in caplog.records] == [True]
    assert signals[0]["pseudo_labels_used"] == 1


def test_views_are_the_authors():
    first, second = hydra(classes=CLASSES).image_views(64)
    assert (first.name, first.size, first.scale, first.solarize) == ("hydra/0", 64, (0.4, 1.0), 0)
    assert (second.name, second.solarize, second.grey, second.blur.p) == ("hydra/1", 0.2, 0.1, 1.0)
    assert (first.jitter.brightness, first.jitter.hue, first.flip) == (0.4, 0.1, 0.5)
    assert [v.size for v in hydra(classes=CLASSES, size=32, jitter=None, blur=0).image_views(64)] == [32, 32]


# ----------------------------------------------------------------------------- gates


@pytest.mark.parametrize("fuse", [True, False])
def test_gates_are_symmetric_and_in_evaluation_of_their_pair_alone(fuse):
    gates = Gates(7, 6, 9, 8, fuse=fuse).double()
    a, b = torch.randint(0, 7, (2, 30))
    torch.testing.assert_close(gates(a, b), gates(b, a))  # also moves the running statistics
    read = gates.read(a, b)
    assert gates.training
    assert ((read > 0) & (read < 1)).all()
    torch.testing.assert_close(torch.cat([gates.read(x[None], y[None]) for x, y in zip(a, b)]), read)
    torch.testing.assert_close(gates.classes()[a], gates.read(a, a))


@pytest.mark.parametrize("size", [1, 2, 9])
def test_all_pairs_come_once_in_blocks(size):
    gates = Gates(size, 6, 9, 8).eval()
    blocks = list(gates.pairs(block=7))
    assert all(len(a) <= 7 and g.shape == (len(a), 8) for a, _, g in blocks)
    pairs = [(int(a), int(b)) for first, second, _ in blocks for a, b in zip(first, second)]
    assert sorted(pairs) == [(a, b) for a in range(size) for b in range(a, size)]
    torch.testing.assert_close(blocks[-1][2], gates.read(*blocks[-1][:2]))


def test_one_pair_alone_can_be_trained_on():
    gates = Gates(3, 6, 9, 8)
    gates(torch.tensor([1]), torch.tensor([2])).sum().backward()
    assert all(m.training for m in gates.modules())
    assert gates.embedding.weight.grad[1].abs().max() > 0


# ----------------------------------------------------------------------------- clusters


def blobs(step: int, rows: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows about four directions, in turn, of several lengths."""
    g = torch.Generator().manual_seed(step)
    kinds = torch.arange(rows) % 4
    centres = torch.eye(WIDTH, dtype=torch.float64)[:4]
    x = centres[kinds] + 0.05 * torch.randn(rows, WIDTH, generator=g, dtype=torch.float64)
    return x * (1 + torch.arange(rows) % 3)[:, None], kinds


def clustered(rank: int, world: int) -> list[torch.Tensor]:
    clusters = OnlineClusters(4, WIDTH, seed=2).double()
    edges = {1: [0, 60], 3: [0, 20, 20, 60]}[world]
    weight = torch.ones(60)
    weight[7] = 0
    mine = slice(edges[rank], edges[rank + 1])
    labels = []
    for step in range(8):
        x = blobs(step)[0]
        x[7] = torch.nan
        labels.append(clusters(x[mine], weight[mine]))
    return [torch.stack(labels, 1), clusters.centroids, clusters.used]


def test_clusters_find_separate_kinds_and_leave_absent_rows_out():
    labels, centroids, used = clustered(0, 1)
    kinds = blobs(0)[1]
    assert labels[7].eq(-1).all()
    last = [set(labels[(kinds == k) & (torch.arange(60) != 7), -1].tolist()) for k in range(4)]
    assert all(len(found) == 1 for found in last)
    assert set.union(*last) == {0, 1, 2, 3}
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert used == 1


def test_clusters_are_the_same_over_ragged_ranks():
    wanted, centroids, used = clustered(0, 1)
    ranks = run_ranks(clustered, 3)
    assert torch.equal(torch.cat([r[0] for r in ranks]), wanted)
    for _, found, share in ranks:
        torch.testing.assert_close(found, centroids, rtol=1e-12, atol=1e-14)
        assert torch.equal(found, ranks[0][1])
        assert share == used


def test_clusters_go_on_from_their_checkpoint():
    first, weight = OnlineClusters(4, WIDTH, seed=2).double(), torch.ones(60)
    first(blobs(0)[0], weight)
    second = OnlineClusters(4, WIDTH, seed=99).double()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(blobs(1)[0], weight), first(blobs(1)[0], weight))
    assert torch.equal(second.centroids, first.centroids)


def test_more_clusters_than_rows_and_no_rows_at_all():
    clusters, x = OnlineClusters(9, WIDTH, seed=2), F.normalize(torch.randn(5, WIDTH), dim=1)
    assert clusters(x, torch.zeros(5)).eq(-1).all()
    assert not clusters.begun
    labels = clusters(x, torch.ones(5))
    assert clusters.begun
    assert ((labels >= 0) & (labels < 9)).all()
    torch.testing.assert_close(clusters.centroids.norm(dim=1), torch.ones(9))
