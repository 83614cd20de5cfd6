"""One whole step of every objective: the same gradients at worlds 1, 2, 3 and accumulation 1, 2, 4, in float64.

The trunk has no BatchNorm (nor position embeddings, which timm resizes in fp32 for small crops); the heads' BatchNorm
sees the whole global batch at any world and accumulation.
"""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.distributed.process import Process
from pretrain.parts import Parts, assemble
from pretrain.reader import Batch
from pretrain.recipe import Recipe, parse_recipe
from pretrain.views.regions import Regions
from tests.ranks import run_ranks
from tests.tiny import VIT, recipe_data

ROWS = 24
SAMPLES = 240
CROPS = [[2, None, [0.3, 1.0]], [2, 12, [0.1, 0.3]]]
RESNET = {"layers": [1, 1, 1, 1], "channels": [32, 32, 32, 32], "output_stride": 8, "norm_layer": "groupnorm"}
MODEL = VIT | {"image": "resnet18", "image_kwargs": RESNET}
PATCHES = VIT | {"regions": {"blocks": 1, "most": 3}}
SWAV = {"crops": CROPS, "prototypes": 12, "hidden": 10, "dim": 6, "freeze_steps": 0}
OBJECTIVES = {
    "swav": {"swav": SWAV},
    "swav with a queue": {"swav": SWAV | {"queue": 3 * ROWS}},
    "moco": {"moco": {"queue": 2 * ROWS, "dim": 6, "hidden": 10}},
    "dino": {"dino": {"crops": CROPS, "prototypes": 12, "hidden": 10, "bottleneck": 6, "freeze_steps": 0}},
    "hydra": {"hydra": {"classes": 4, "dim": 6, "hidden": 10, "gate_width": 5, "gate_hidden": 7}},
    "pyramid_clip": {"pyramid_clip": 1.0},
    "siglip": {"siglip": 1.0},
    "captions": {"clip": {"captions": 3, "smoothing": 0.1}, "siglip": {"captions": 2, "weight": 0.1}},
    "clip and swav": {"clip": 1.0, "swav": SWAV | {"weight": {"start": 0.0, "end": 0.5, "to_step": 8}}},
}
STEPS = 5


def recipe(name: str, accumulation: int) -> Recipe:
    model = PATCHES if name == "pyramid_clip" else MODEL
    changes = {"model": model, "global_batch": ROWS, "accumulation": accumulation, "objectives": OBJECTIVES[name]}
    return parse_recipe(recipe_data("shards", "run", **changes), "test")


def parts_of(name: str, rank: int, world: int, accumulation: int) -> Parts:
    """The run's parts in float64."""
    torch.set_default_dtype(torch.float64)  # so that every head is made in it too
    try:
        return assemble(recipe(name, accumulation), SAMPLES, Process(rank, world, 0, torch.device("cpu")))
    finally:
        torch.set_default_dtype(torch.float32)


def global_batch(parts: Parts, step: int) -> Batch:
    """Random pixels, words and classes; one row is damaged."""
    g = torch.Generator().manual_seed(step)
    weight = torch.ones(ROWS, dtype=torch.float64)
    weight[7] = 0
    labels = torch.randint(0, 4, (ROWS,), generator=g)
    labels[7] = -1
    tokens = torch.zeros(ROWS, 12, dtype=torch.int64)
    tokens[:, :6] = torch.randint(1, 400, (ROWS, 6), generator=g)
    tokens[:, 6] = 49407
    views = parts.joint.image_views(MODEL["image_size"])
    texts = {v.name: tokens.roll(i, dims=0) for i, v in enumerate(parts.joint.text_views())}
    optional = [v.name for v in parts.joint.text_views() if v.after or not v.required]
    present = {name: torch.rand(ROWS, generator=g) < 0.7 for name in optional}
    for name in optional:
        texts[name] = texts[name] * present[name][:, None]
    mask = torch.rand(ROWS, 3, generator=g).sort(dim=1, descending=True)[0] > 0.5
    corner = torch.rand(ROWS, 3, 2, generator=g) / 2
    boxes = torch.cat((corner, corner + 0.4), dim=2) * mask[..., None]
    return Batch(
        step=step,
        ids=torch.arange(ROWS),
        source=torch.zeros(ROWS, dtype=torch.int64),
        epoch=torch.zeros(ROWS, dtype=torch.int64),
        keys=[str(i) for i in range(ROWS)],
        weight=weight,
        labels=labels,
        images={
            v.name: torch.randint(0, 256, (ROWS, 3, v.size, v.size), dtype=torch.uint8, generator=g) for v in views
        },
        tokens=texts,
        captions={name: [""] * ROWS for name in texts},
        present=present | {"regions": mask.any(dim=1)},
        regions={"regions": Regions(boxes, boxes.new_zeros(ROWS, 3, 0), mask)},
    )


def run_steps(rank: int, world: int, name: str, accumulations: tuple[int, ...]) -> list[list[dict]]:
    return [steps(name, rank, world, a) for a in accumulations]


def steps(name: str, rank: int, world: int, accumulation: int) -> list[dict]:
    """Loss, signals, every gradient and the state that is carried on, of some steps of plain gradient descent."""
    parts = parts_of(name, rank, world, accumulation)
    rows, found = ROWS // world, []
    for step in range(STEPS):
        batch = global_batch(parts, step)
        mine = batch.rows(rank * rows, (rank + 1) * rows)
        if step == 0:
            parts.backend.warm_up(parts.two_stage.inputs(mine.rows(0, rows // accumulation)))
        parts.joint.before_step(step)
        result = parts.two_stage(mine)
        parts.replicated.reduce(result.loss)
        named = {**dict(parts.backend.trunk.named_parameters()), **dict(parts.joint.members.named_parameters())}
        gradients = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        descend(named, parts, step, lr=1e-3 if name in ("moco", "dino") else 0.0)
        buffers = {n: b.clone() for n, b in parts.joint.members.state_dict().items() if not n.endswith("held")}
        figures = {n: float(f) for n, f in result.figures.items()}
        found.append({"loss": result.loss, "figures": figures, "gradients": gradients, "state": buffers})
    return found


def descend(named: dict, parts: Parts, step: int, lr: float) -> None:
    """A small step: an untrained head's BatchNorm amplifies rounding a hundredfold a step; none where it need not."""
    with torch.no_grad():
        for p in named.values():
            if p.grad is not None:
                p -= lr * p.grad
                p.grad = None
    momentum = parts.joint.teacher_momentum(step)
    if momentum is not None:
        parts.backend.update_teacher(momentum, step)
    parts.joint.after_step(step)


def check_same(found: list[dict], expected: list[dict], bound: float) -> None:
    for step, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert f["loss"].dtype == torch.float64
        assert abs(f["loss"] - e["loss"]) < bound, step
        assert f["figures"].keys() == e["figures"].keys()
        for n in e["figures"]:
            assert f["figures"][n] == pytest.approx(e["figures"][n], abs=1e-9), (step, n)
        for kind in ("gradients", "state"):
            assert f[kind].keys() == e[kind].keys()
            scale = max((float(tensor.abs().max()) for tensor in e[kind].values()), default=1.0)
            for n, tensor in e[kind].items():
                assert (f[kind][n] - tensor).abs().max() <= bound * scale, (step, kind, n)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_step_is_the_same_at_any_world_and_accumulation(name):
    expected, *others = run_steps(0, 1, name, (1, 2, 4))
    assert all(e["gradients"] for e in expected)
    for found in others:
        check_same(found, expected, 1e-12)
    for world in (2, 3):
        for rank in run_ranks(run_steps, world, name, (1, 4)):
            for found in rank:
                check_same(found, expected, 1e-12)


def test_joint_weights_follow_their_schedule():
    parts = parts_of("clip and swav", 0, 1, 1)
    for step in (0, 4, 8, 9):
        batch = global_batch(parts, step)
        parts.joint.before_step(step)
        result = parts.two_stage(batch)
        share = min(step / 8, 1) * 0.5
        figures = result.figures
        assert float(result.loss) == pytest.approx(float(figures["loss/clip"] + share * figures["loss/swav"]))


def test_the_teacher_follows_the_student_and_takes_no_gradient():
    parts = parts_of("dino", 0, 1, 1)
    before = [p.clone() for p in parts.backend.teacher.parameters()]
    parts.joint.before_step(0)
    parts.two_stage(global_batch(parts, 0))
    assert all(p.grad is None for p in parts.backend.teacher.parameters())
    named = dict(parts.backend.trunk.named_parameters())
    descend(named, parts, 0, lr=1e-3)
    m = 1.0 - (1.0 - 0.996) * 0.5 * (1 + math.cos(0))
    for old, new, student in zip(before, parts.backend.teacher.parameters(), parts.backend.trunk.parameters()):
        torch.testing.assert_close(new, m * old + (1 - m) * student, rtol=1e-12, atol=1e-12)
