"""`check`: what it counts is what a run takes, and what it finds wrong is what a run would refuse or spoil."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.__main__ import main
from pretrain.check import Report, check, fit, memory
from pretrain.check.show import show
from pretrain.checkpoint import find_latest
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.models.compute import checkpoint_blocks
from pretrain.parts import assemble, build_modules
from pretrain.probe import probe_inputs
from pretrain.recipe import Recipe, parse_recipe
from tests.runs import train_here
from tests.tiny import RESNET, VIT, add, picture, recipe_data, write_recipe, write_shards

CLIP_RESNET = RESNET | {"image": "resnet50_clip", "image_size": 64, "image_kwargs": {}}
CLIP_VIT = VIT | {
    "image": "vit_base_patch32_clip_224",
    "image_size": 32,
    "image_kwargs": {"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": 8},
}
SSL = {"dino": {"prototypes": 64, "hidden": 16, "bottleneck": 8, "freeze_steps": 0, "crops": [[2, 16, [0.4, 1.0]]]}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


def looked(shards: Path, tmp_path: Path, options: dict[str, Any] | None = None, **changes: Any) -> Report:
    return check(parse_recipe(recipe_data(shards, tmp_path / "run", **changes), "test"), **(options or {}))


def listing(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


def write_tar(folder: Path, members: dict[str, bytes], samples: int = 24) -> Path:
    """Samples with a picture and these members each."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(samples):
            for extension, content in {"png": picture(i), **members}.items():
                add(tar, f"s{i:04d}.{extension}", content)
    return folder


# ---- memory


PYRAMID = {"pyramid_clip": 1.0}
MODELS = {
    "vit": (VIT, {"clip": 1.0}),
    "resnet": (RESNET, {"clip": 1.0}),
    "pyramid-vit": (CLIP_VIT | {"leff": 1, "regions": {}}, PYRAMID),
    "pyramid-resnet": (CLIP_RESNET | {"regions": {"stored_dim": 8}}, PYRAMID),
}


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, "fp32") for name in MODELS] + [(name, "bf16") for name in MODELS if name != "pyramid-resnet"],
)
def test_the_activations_are_what_autograd_really_keeps(name, precision):
    model, objectives = MODELS[name]
    data = recipe_data(Path("shards"), Path("run"), model=model, objectives=objectives, precision=precision)
    recipe = parse_recipe(data, "test")
    with torch.device("meta"):
        on_meta, joint, _ = build_modules(recipe, 60, 0, 1)
    trunk, *_ = build_modules(recipe, 60, 0, 1)
    inputs = probe_inputs(joint, recipe, 9)
    counted = memory.forward(on_meta, inputs, bf16=precision == "bf16")
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        memory.SavedBytes([*trunk.parameters(), *trunk.buffers()]) as real,
    ):
        trunk({request: materialised(x) for request, x in inputs.items()})
    # the CPU's autocast leaves a few operations in bf16 that CUDA's does in fp32
    within = 0.01 if precision == "fp32" else 0.15
    assert counted.saved + counted.cast_weights == pytest.approx(real.bytes(), rel=within)


@pytest.mark.parametrize("name", ["vit", "resnet", "pyramid-vit"])
def test_the_activations_of_checkpointed_blocks_are_what_autograd_really_keeps(name):
    model, objectives = MODELS[name]
    recipe = parse_recipe(recipe_data(Path("s"), Path("r"), model=model, objectives=objectives), "test")
    modules = memory.build(recipe, 60, 1)
    inputs = probe_inputs(modules.joint, recipe, 9)
    counted = memory.forward(modules.trunk, inputs, bf16=False)
    trunk, *_ = build_modules(recipe, 60, 0, 1)
    checkpoint_blocks(trunk)
    with memory.SavedBytes([*trunk.parameters(), *trunk.buffers()]) as real:
        trunk({request: materialised(x) for request, x in inputs.items()})
    assert counted.checkpointed == pytest.approx(real.bytes(), rel=0.01)
    assert counted.checkpointed + counted.largest_block < counted.saved


def materialised(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return torch.randint(0, 255, x.shape, dtype=torch.uint8) if x.is_meta else x
    return x._replace(images=materialised(x.images))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": {"name": "sgd"}, "ema": {"decay": 0.9}},
        {"model": VIT | {"text": None, "embed_dim": None}, "objectives": SSL},
    ],
    ids=["adamw", "sgd-ema", "teacher"],
)
def test_a_checkpoint_has_the_size_that_was_told(shards, tmp_path, changes):
    data = recipe_data(shards, tmp_path / "run", steps=2, **changes)
    told = check(parse_recipe(data, "test")).sections["checkpoints"]["one_bytes"]
    assert train_here(write_recipe(tmp_path / "recipe.yaml", data)) == 0
    written = find_latest(tmp_path / "run" / "checkpoints")
    assert written is not None
    real = sum(written.read(name).nbytes for name in written.names())
    assert told == pytest.approx(real, rel=0.02)


def test_what_no_objective_reaches_is_not_counted_as_trained(shards, tmp_path):
    data = recipe_data(shards, tmp_path / "run", objectives=SSL)  # a text tower that no objective reads
    recipe = parse_recipe(data, "test")
    parts = assemble(recipe, 60, Process(0, 1, 0, torch.device("cpu")))
    trained = sum(p.numel() for p in (*parts.backend.trunk.parameters(), *parts.joint.parameters()) if p.requires_grad)
    sections = check(recipe).sections
    assert sections["model"]["trained"] == trained
    assert sections["memory of a rank"]["optimizer_bytes"] == 8 * trained


def test_weights_that_are_kept_whole_or_come_whole_are_counted():
    def held(**changes: Any) -> dict[str, int]:
        recipe = parse_recipe(recipe_data(Path("s"), Path("r"), **changes), "test")
        return memory.rank(recipe, memory.build(recipe, 60, 64), world=64)

    recipe = parse_recipe(recipe_data(Path("s"), Path("r")), "test")
    modules = memory.build(recipe, 60, 64)
    whole = 4 * sum(p.numel() for p in modules.trunk.parameters())
    kept = held(backend="fsdp2", sharding={"reshard_after_forward": False})
    assert kept["gathered_bytes"] > whole
    assert kept["total_bytes"] > held(backend="fsdp2")["total_bytes"]
    wide = VIT | {"text": VIT["text"] | {"vocab": 10_000_000}}
    assert held(backend="zero3", model=wide)["total_bytes"] >= 4 * 16 * 10_000_000


def test_what_does_not_fit_is_told_with_an_accumulation_that_fits(shards, tmp_path):
    def problems(accumulation: int, gpu_bytes: int) -> list[str]:
        changes = {"model": RESNET, "global_batch": 48, "accumulation": accumulation}
        return looked(shards, tmp_path, {"gpu_bytes": gpu_bytes}, **changes).problems

    (problem,) = problems(1, 24 << 20)
    accumulation = int(problem.partition("accumulation=")[2].split()[0])
    assert accumulation > 1
    assert problems(accumulation, 24 << 20) == []
    assert problems(1, 1 << 20)[0].endswith("more ranks, or a smaller model")


@pytest.mark.parametrize(
    ("changes", "mib", "wanted"),
    [
        ({}, 250, "accumulation=2"),
        ({}, 225, "precision=bf16 accumulation="),
        ({"precision": "bf16"}, 190, "compute.checkpoint_blocks=true accumulation="),
        ({"precision": "bf16", "compute": {"checkpoint_blocks": True}}, 165, "backend=zero2 accumulation="),
        (
            {"precision": "bf16", "compute": {"checkpoint_blocks": True}, "optimizer": {"name": "muon"}},
            130,
            "backend=fsdp2",
        ),
    ],
)
def test_what_would_fit_is_told_in_the_order_of_its_cost(changes, mib, wanted):
    vit = VIT | {"image": "vit_small_patch16_224", "image_size": 448, "image_kwargs": {"depth": 4}}
    recipe = parse_recipe(recipe_data(Path("s"), Path("r"), model=vit, global_batch=8, **changes), "test")
    modules = memory.build(recipe, 60, 4)
    said = fit.advice(recipe, modules, mib << 20, 4)
    assert said.partition(": ")[2].startswith(wanted), said
    k = int(said.partition("accumulation=")[2].split()[0])
    assert 2 % k == 0


def test_every_backend_is_told_with_what_a_rank_holds(shards, tmp_path):
    table = looked(shards, tmp_path, {"world": 4}).sections["memory of a rank by backend"]
    assert list(table) == ["ddp", "zero1", "zero2", "fsdp2", "zero3"]
    trunk, joint, _ = build_modules(parse_recipe(recipe_data(shards, tmp_path), "test"), 60, 0, 1)
    buffers = sum(b.nbytes for b in trunk.buffers())
    assert buffers == 0
    whole = 4 * sum(p.numel() for p in trunk.parameters())
    own = 16 * sum(p.numel() for p in joint.parameters())
    state = {name: row["state_bytes"] - own for name, row in table.items()}
    assert state["ddp"] == 4 * whole
    assert state["zero1"] == pytest.approx(
        (2 + 3 / 4 + 1) * whole, abs=8
    )  # masters, and a bucket as large as the model
    assert state["zero2"] == pytest.approx((1 + 4 / 4 + 1) * whole, abs=8)
    assert state["fsdp2"] > whole  # tiny as it is, most of it is gathered
    muon = looked(shards, tmp_path, {"world": 4}, optimizer={"name": "muon"})
    assert list(muon.sections["memory of a rank by backend"]) == ["ddp", "fsdp2"]
    assert "fsdp2" in show(muon)


# ---- local_batch


def test_a_local_batch_becomes_an_accumulation(shards, tmp_path):
    def resolved(world: int = 2, **changes: Any) -> Recipe:
        recipe = parse_recipe(recipe_data(shards, tmp_path / "run", **changes), "test")
        return fit.resolve_local_batch(recipe, world, torch.device("cpu"))

    assert resolved().accumulation == 1
    done = resolved(local_batch=2)
    assert (done.accumulation, done.local_batch) == (3, None)
    with pytest.raises(UserError, match="local_batch 4 does not divide a rank's 6 samples of a step; try 3 or 6"):
        resolved(local_batch=4)
    with pytest.raises(UserError, match="local_batch 9 does not divide a rank's 6 samples of a step; try 6"):
        resolved(local_batch=9)
    with pytest.raises(UserError, match="give one of them"):
        resolved(local_batch=2, accumulation=2)
    with pytest.raises(UserError, match="must be a multiple of world 5"):
        resolved(world=5, local_batch=2)


def test_a_local_batch_is_looked_at_as_it_will_run(shards, tmp_path):
    def seen(gpu_bytes: int | None = None, **changes: Any) -> Report:
        return looked(shards, tmp_path, {"gpu_bytes": gpu_bytes}, model=RESNET, global_batch=48, **changes)

    needed = {k: seen(accumulation=k).sections["memory of a rank"]["total_bytes"] for k in (1, 8)}
    report = seen(local_batch=6)
    assert report.problems == []
    assert report.sections["recipe"]["micro_batch"] == 6
    assert report.sections["memory of a rank"]["total_bytes"] == needed[8] < needed[1]
    assert "local_batch 9 does not divide a rank's 48 samples of a step; try 8 or 12" in seen(local_batch=9).problems
    (problem,) = seen(24 << 20, local_batch=48).problems
    advised = problem.rpartition(": ")[2].removesuffix(" would fit")
    assert advised.startswith("local_batch=")
    assert seen(24 << 20, local_batch=int(advised.partition("=")[2])).problems == []
    chosen = seen(24 << 20, local_batch="auto")
    assert chosen.problems == []
    assert chosen.sections["recipe"]["micro_batch"] < 48
    (problem,) = seen(1 << 20, local_batch="auto").problems
    assert problem.startswith("local_batch auto: a rank needs about")
    assert any("--gpu-memory" in note for note in seen(local_batch="auto").notes)


def test_auto_is_the_smallest_accumulation_that_fits_nine_tenths(shards, tmp_path, monkeypatch, caplog):
    data = recipe_data(shards, tmp_path / "run", model=RESNET, global_batch=48, local_batch="auto")
    recipe = parse_recipe(data, "test")
    needed = {
        k: looked(shards, tmp_path, model=RESNET, global_batch=48, accumulation=k).sections["memory of a rank"]
        for k in (1, 4)
    }
    caplog.set_level("INFO")
    for k in (1, 4):
        there = needed[k]["total_bytes"] / 0.9 + 8
        monkeypatch.setattr(fit, "memory_of", lambda *_, there=there: there)
        assert fit.resolve_local_batch(recipe, 1, torch.device("cpu")).accumulation == k
    assert "local_batch auto: 12 samples at once, accumulation 4" in caplog.text
    assert "statistics are of a micro-batch" in caplog.text
    monkeypatch.setattr(fit, "memory_of", lambda *_: 1 << 20)
    with pytest.raises(UserError, match=r"local_batch auto: a rank needs about .*more ranks, or a smaller model"):
        fit.resolve_local_batch(recipe, 1, torch.device("cpu"))
    monkeypatch.undo()
    assert fit.resolve_local_batch(recipe, 1, torch.device("cpu")).accumulation == 1


def test_the_free_memory_of_a_machine_is_shared_by_its_ranks(monkeypatch):
    alone = fit.memory_of(torch.device("cpu"), 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert fit.memory_of(torch.device("cpu"), 8) == pytest.approx(alone / 2, rel=0.2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert fit.memory_of(torch.device("cpu"), 4) == pytest.approx(alone / 4, rel=0.2)


def test_a_large_model_takes_no_memory_and_its_size_is_told(shards, tmp_path):
    model = {"image": "vit_large_patch14_clip_224", "embed_dim": 768, "text": {"width": 768, "heads": 12}}
    report = looked(shards, tmp_path, model=model)
    assert report.sections["model"]["trained"] == 427_616_513  # open_clip's ViT-L-14
    assert report.sections["memory of a rank"]["optimizer_bytes"] == 8 * 427_616_513


# ---- data


def test_a_run_without_problems(shards, tmp_path):
    before = listing(tmp_path) | listing(shards)
    report = looked(shards, tmp_path, {"images_per_s": 48.0})
    assert report.problems == []
    (source,) = report.sections["data"]
    assert (source["shards"], source["samples"], source["captions"], source["classes"]) == (3, 60, "100%", "100%")
    assert report.sections["plan"]["time_s"] == 8 * 12 / 48.0
    assert report.sections["plan"]["epochs"] == 1.6
    assert listing(tmp_path) | listing(shards) == before  # not even an index beside the tars


def test_captions_wanted_of_a_class_folder(tmp_path):
    folder = write_tar(tmp_path / "classes", {"cls": b"3"})
    (problem,) = looked(folder, tmp_path).problems
    assert "none of the samples have a caption (.txt), which objective clip reads" in problem
    assert "python -m pretrain pack captions.tsv" in problem


def test_classes_wanted_of_captions(tmp_path):
    folder = write_tar(tmp_path / "captions", {"txt": b"a thing"})
    hydra = {"hydra": {"classes": 3, "dim": 8, "hidden": 8, "gate_width": 8, "gate_hidden": 8}}
    (problem,) = looked(folder, tmp_path, objectives=hydra, model=VIT | {"text": None}).problems
    assert "none of the samples have a class (.cls), which objective hydra reads" in problem


def test_summaries_and_objects_that_pyramid_clip_misses(tmp_path):
    model = CLIP_VIT | {"regions": {}}
    bare = write_tar(tmp_path / "bare", {"txt": b"a thing", "json": b'{"width": 3}'})
    problems = looked(bare, tmp_path, objectives={"pyramid_clip": 1.0}, model=model).problems
    assert len(problems) == 2
    assert "a summary (.summary.txt)" in problems[0]
    assert f"python -m pretrain enrich {bare}" in problems[0]
    assert "objects (.json)" in problems[1]
    objects = json.dumps({"objects": [{"box": [0, 0, 0.5, 0.5], "label": "thing"}]}).encode()
    rich = write_tar(tmp_path / "rich", {"txt": b"a thing", "summary.txt": b"thing", "json": objects})
    assert looked(rich, tmp_path, objectives={"pyramid_clip": 1.0}, model=model).problems == []


def test_shards_that_are_elsewhere(tmp_path):
    away = tmp_path / "away" / "{000..009}.tar"
    problems = looked(away, tmp_path, steps=None, epochs=2).problems
    assert any("no shard" in p for p in problems)
    assert any("--samples" in p for p in problems)
    report = looked(away, tmp_path, {"samples": 1200}, steps=None, epochs=2)
    assert report.problems == []
    assert any("not looked at: no shard" in note for note in report.notes)
    assert report.sections["plan"]["steps"] == 200
    assert report.sections["memory of a rank"]["caption_tokens"] == VIT["text"]["context"]


# ---- what training refuses, in its words


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objectives": {"clap": 1.0}}, "no objective 'clap'; did you mean clip"),
        ({"model": VIT | {"image": "vit_tiny_patch17"}}, "timm"),
        ({"model": VIT | {"text": None}}, "model.text: null"),
        ({"global_batch": 96}, "60"),
        ({"init": "nowhere.safetensors"}, "init.weights: no file nowhere.safetensors"),
        ({"schedule": {"warmup_steps": 8}}, "never reaches"),
        ({"model": CLIP_VIT | {"lock": {"image": True, "projection": True, "text": True}}}, "lock"),
    ],
    ids=["objective", "tower", "text", "batch", "init", "warm-up", "lock"],
)
def test_refusals(shards, tmp_path, changes, said):
    assert any(said in problem for problem in looked(shards, tmp_path, **changes).problems)


def test_a_batch_that_the_ranks_do_not_divide_is_told_with_those_they_do(shards, tmp_path):
    report = looked(shards, tmp_path, {"world": 5})
    assert "global_batch 12 must be a multiple of world 5 x accumulation 1; try 10 or 15" in report.problems


def test_a_model_that_cannot_run_is_a_problem_and_no_traceback(shards, tmp_path):
    model = CLIP_VIT | {"leff": 3, "regions": {}}  # regions have no neighbours that LeFF could mix
    assert looked(shards, tmp_path, model=model, objectives=PYRAMID).problems


# ---- the door


def test_the_door_says_it_for_people_and_for_machines(shards, tmp_path, capsys):
    recipe = str(write_recipe(tmp_path / "recipe.yaml", recipe_data(shards, tmp_path / "run")))
    assert main(["check", recipe]) == 0
    assert capsys.readouterr().out.endswith("nothing is wrong\n")
    assert main(["check", recipe, "global_batch=11", "--world", "2", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["recipe"]["global_batch"] == 11
    assert any("must be a multiple of world 2" in problem for problem in told["problems"])
