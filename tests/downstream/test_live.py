"""Evaluation in training: the commands' own figures at any world and backend, and a training that does not notice."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from downstream import live_sets
from downstream.evaluate import evaluate_knn, evaluate_retrieval, evaluate_zeroshot
from downstream.live import Live
from downstream.samples import Samples
from downstream.spectrum import evaluate_spectrum
from downstream.weights import open_weights
from downstream.zeroshot import names_and_templates
from pretrain import patience
from pretrain.checkpoint import find_checkpoint, find_latest
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.evaluation import live_evaluation
from pretrain.parts import assemble
from pretrain.recipe import Recipe, parse_recipe
from pretrain.telemetry import read_log
from pretrain.train import train
from tests.downstream.scenes import write_tar
from tests.ranks import run_ranks
from tests.tiny import RESNET, VIT, picture, recipe_data, write_shards

MOCO = {"queue": 36, "dim": 8, "hidden": 16, "momentum": 0.9}
TASKS = ["knn", "retrieval", "zeroshot", "rankme"]
VIT_DROPOUT = VIT | {"text": VIT["text"] | {"dropout": 0.2}}
PARTS: dict[str, dict[str, Any]] = {
    "resnet": {"model": RESNET, "objectives": {"clip": 1.0, "moco": MOCO}, "ema": {}},
    "vit": {"model": VIT_DROPOUT, "accumulation": 2, "ema": {}},
    "locked": {"model": RESNET | {"lock": {"image": True}}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 images that vote; 90 to judge, of which one is damaged, one has no class and one no caption."""
    root = tmp_path_factory.mktemp("live")
    write_shards(root / "data/train", 150)
    test = write_shards(root / "data/test", 87)
    odd: list[dict[str, bytes]] = [{"png": picture(i), "txt": f"odd {i}".encode(), "cls": b"1"} for i in range(3)]
    odd[0]["png"] = b"\x89PNG broken"
    del odd[1]["cls"], odd[2]["txt"]
    shutil.move(write_tar(root / "odd/0.tar", odd) / "0.tar", test / "00003.tar")
    for line in ("a photo of a {c}.", "{c}, drawn"):
        with (test / "zeroshot_classification_templates.txt").open("a") as file:
            file.write(f"{line}\n")
    return root


def asked(root: Path, **changes: Any) -> dict[str, Any]:
    data = root / "data"
    return {"every": 2, "shards": str(data / "test"), "train": str(data / "train"), "tasks": TASKS} | changes


def recipe(root: Path, name: str, **changes: Any) -> Recipe:
    return parse_recipe(recipe_data(root / "data/train", root / name, steps=4, **changes), "test")


def alone() -> Process:
    return Process(0, 1, 0, torch.device("cpu"))


def live_of(made: Recipe, process: Process, checkpoint: Path | None = None) -> Live:
    parts = assemble(made, 150, process, find_checkpoint(checkpoint) if checkpoint else None)
    found = live_evaluation(made, parts.backend)
    assert isinstance(found, Live)
    return found


def figures(live: Live) -> dict[str, float]:
    found = live.run(1, lambda: None, lambda: False)
    assert found is not None
    assert found.pop("eval/seconds") > 0
    return found


def commands(root: Path, run: Path, weights: str) -> dict[str, float]:
    """What `python -m downstream` says of a checkpoint, by the names of the live figures."""
    opened = open_weights(run, weights=weights, device="cpu")  # type: ignore[arg-type]
    train, test = (Samples(str(root / "data" / split)) for split in ("train", "test"))
    knn = evaluate_knn(opened, train, test).result.metrics
    named = evaluate_zeroshot(opened, test, *names_and_templates(test)).result.metrics
    pairs = evaluate_retrieval(opened, test).result.metrics
    spread = evaluate_spectrum(opened, None, test).result.metrics
    return {
        "eval/knn_top1": knn["k20_acc1"],
        "eval/zeroshot_top1": named["acc1"],
        "eval/rankme/pooled": spread["encoder_rankme"],
        **{f"eval/{name.replace('@', '_')}": value for name, value in pairs.items()},
    }


def trained(root: Path, rank: int, world: int, kind: str, backend: str, evaluate: bool) -> dict[str, torch.Tensor]:
    """A run of four steps through the trainer's own loop; all that its last checkpoint holds."""
    name = f"{kind}-{backend}-{world}-{'with' if evaluate else 'without'}"
    section = {"evaluate": asked(root, weights="ema" if kind == "vit" else "model")} if evaluate else {}
    made = recipe(root, name, backend=backend, **PARTS[kind], **section)
    assert train(made, Process(rank, world, rank, torch.device("cpu")))
    checkpoint = find_latest(root / name / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 4
    return {n: checkpoint.read(n) for n in checkpoint.names()}


def check_training(root: Path, rank: int, world: int, kind: str, backend: str) -> None:
    """Weights, statistics, optimizer and queues are the same to the bit, evaluated or not."""
    expected, found = (trained(root, rank, world, kind, backend, evaluate) for evaluate in (False, True))
    assert expected.keys() == found.keys()
    assert [n for n in expected if not torch.equal(expected[n], found[n])] == []
    log = read_log(root / f"{kind}-{backend}-{world}-with")
    assert [("eval/knn_top1" in line, "eval/seconds" in line) for line in log] == [
        (n % 2 == 0,) * 2 for n in range(1, 5)
    ]


def stops_together(live: Live, rank: int) -> list[int]:
    """Batches until the evaluation ends, told to at the third batch; None is handed over."""
    beats, answers = [], []

    def stop() -> bool:
        answers.append(rank)
        return len(answers) == 3

    assert live.run(1, lambda: beats.append(rank), stop) is None
    assert all(module.training for module in live._backend.trunk.modules())
    return [len(beats), len(answers)]


def on_ranks(rank: int, world: int, root: str, backends: list[str], kinds: list[str]) -> dict[str, Any]:
    where, process = Path(root), Process(rank, world, rank, torch.device("cpu"))
    found: dict[str, Any] = {}
    for backend in backends:
        for kind in kinds:
            check_training(where, rank, world, kind, backend)
        for weights in ("model", "teacher", "ema"):
            made = recipe(where, "any", backend=backend, **PARTS["resnet"], evaluate=asked(where, weights=weights))
            live = live_of(made, process, where / "resnet-ddp-1-with")
            found[f"{backend} {weights}"] = figures(live)
            assert figures(live) == found[f"{backend} {weights}"]  # of pixels that were kept
        assert stops_together(live, rank) == [3, 3]
    return found


@pytest.fixture(scope="module")
def one(root: Path) -> dict[str, Any]:
    """Everything on one rank; leaves the run that other worlds evaluate."""
    return on_ranks(0, 1, str(root), ["ddp"], list(PARTS))


@pytest.mark.parametrize("weights", ["model", "teacher", "ema"])
def test_figures_are_those_of_the_commands(root: Path, one: dict[str, Any], weights: str) -> None:
    found, expected = one[f"ddp {weights}"], commands(root, root / "resnet-ddp-1-with", weights)
    assert len(found) == len(expected) + 1  # RankMe of the embedding; five classes there are none
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    assert len(set(map(str, (one[f"ddp {w}"] for w in ("model", "teacher", "ema"))))) == 3


def test_the_log_has_the_figures_of_the_checkpoint_of_that_step(root: Path, one: dict[str, Any]) -> None:
    for kind, weights in (("resnet", "model"), ("vit", "ema")):
        run = root / f"{kind}-ddp-1-with"
        log = {line["step"]: line for line in read_log(run)}
        for step in (2, 4):
            for name, value in commands(root, run / f"checkpoints/step_{step:08d}", weights).items():
                assert log[step][name] == pytest.approx(value, rel=1e-6), (step, name)


@pytest.mark.parametrize("world", [2, 3])
def test_figures_and_training_do_not_depend_on_the_ranks(root: Path, one: dict[str, Any], world: int) -> None:
    """Three ranks share two batches of images: one goes through the towers with zeros."""
    for found in run_ranks(on_ranks, world, str(root), ["ddp"], list(PARTS)):
        assert found == one


def test_sharded_weights_and_copies_give_the_same_figures(root: Path, one: dict[str, Any]) -> None:
    for found in run_ranks(on_ranks, 3, str(root), ["fsdp2", "zero2", "zero3"], ["vit"]):
        for name, of in found.items():
            assert of == pytest.approx(one[f"ddp {name.split()[1]}"], rel=1e-6), name


def test_kept_images_are_bounded_and_damage_is_said_once(root: Path, monkeypatch, caplog) -> None:
    made = recipe(root, "bounded", evaluate=asked(root, tasks=["knn"]))
    monkeypatch.setattr(live_sets, "KEPT_BYTES", 100_000)  # two batches of 64 images of 16 pixels; one stays out
    live = live_of(made, alone())
    with caplog.at_level(logging.WARNING):
        first = figures(live)
        decoded, preprocess = [], live._towers.preprocess
        monkeypatch.setattr(live._towers, "preprocess", lambda data: decoded.append(data) or preprocess(data))
        assert figures(live) == first
    assert len(decoded) == 150 - 128
    assert sum("left out" in record.message for record in caplog.records) == 1


def flaky(samples: live_sets.LiveSamples, broken: list[int]) -> None:
    """Its reads fail for `broken[0]` more times, as those of a link that is down."""
    read = samples._read

    def fail(*where: int) -> bytes:
        if broken[0]:
            broken[0] -= 1
            raise OSError(5, "Input/output error")
        return read(*where)

    samples._read = fail  # type: ignore[method-assign]


def reads_that_fail(rank: int, world: int, root: str) -> list[Any]:
    made = recipe(Path(root), "flaky", evaluate=asked(Path(root), tasks=["knn"]))
    patience.PAUSES_S = (0.01, 0.01)
    live, broken = live_of(made, Process(rank, world, rank, torch.device("cpu"))), [0]
    flaky(live._sets.test, broken)
    found = []
    for times in (9, 2, 0):  # too often, on the last rank alone; less than it is tried; never
        broken[0] = times * (rank == world - 1)
        found.append(figures(live))
    return [*found, broken[0]]


@pytest.mark.parametrize("world", [1, 2])
def test_images_that_cannot_be_read_now_are_no_damage(root: Path, world: int) -> None:
    ranks = run_ranks(reads_that_fail, world, str(root))
    assert all(found == ranks[0] for found in ranks)
    failed, again, whole, _ = ranks[0]
    assert failed == {}
    assert again == whole
    assert whole["eval/knn_top1"] > 0


def test_shards_that_vanish_end_no_training(root: Path, tmp_path: Path, caplog) -> None:
    shutil.copytree(root / "data/test", tmp_path / "test")
    live = live_of(recipe(root, "gone", evaluate=asked(root, shards=str(tmp_path / "test"), tasks=["rankme"])), alone())
    shutil.rmtree(tmp_path / "test")
    assert figures(live) == {}
    assert "step 1: not evaluated" in caplog.text


def test_weights_that_give_no_numbers_end_no_training(root: Path, caplog) -> None:
    live = live_of(recipe(root, "nan", evaluate=asked(root, tasks=["rankme"])), alone())
    torch.nn.init.constant_(live._backend.trunk.image.projection.weight, torch.nan)
    assert figures(live) == {}
    assert "step 1: not evaluated: evaluate (weights: model) gives vectors that are not finite" in caplog.text


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({"shards": "{root}/none"}, VIT, r"evaluate\.shards: .*none"),
        ({"train": "{root}/none"}, VIT, r"evaluate\.train: .*none"),
        ({"train": None}, VIT, r"evaluate\.train: knn needs"),
        ({"shards": "{root}/bare", "tasks": ["knn"]}, VIT, r"evaluate\.shards: .*bare: no sample has a class"),
        ({"train": "{root}/bare", "tasks": ["knn"]}, VIT, r"evaluate\.train: .*none can vote"),
        ({"shards": "{root}/bare", "tasks": ["zeroshot"]}, VIT, r"evaluate\.shards: .*no classnames\.txt"),
        ({"shards": "{root}/bare", "tasks": ["retrieval"]}, VIT, r"evaluate\.shards: .*caption"),
        ({"shards": "{root}/word", "tasks": ["knn"]}, VIT, r"evaluate\.shards: .*its class is 'dog'"),
        (
            {"shards": "{root}/word/../high", "tasks": ["zeroshot"]},
            VIT,
            r"evaluate\.shards: .*class 7, but there are 2",
        ),
        ({"tasks": ["retrieval", "zeroshot"]}, VIT | {"text": None}, r"evaluate\.tasks: retrieval and zeroshot need"),
        ({"weights": "teacher"}, VIT, r"evaluate\.weights: teacher: no objective"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_training(root: Path, changes, model, message: str) -> None:
    write_tar(root / "bare/0.tar", [{"png": picture(0)}])
    write_tar(root / "word/0.tar", [{"png": picture(0), "cls": b"dog"}])
    write_tar(root / "high/0.tar", [{"png": picture(0), "cls": b"7"}])
    (root / "high/classnames.txt").write_text("a\nb\n")
    changes = {k: v.format(root=root) if isinstance(v, str) else v for k, v in changes.items()}
    objectives = {"clip": 1.0} if model["text"] else {"moco": MOCO}
    made = recipe(root, "refused", model=model, objectives=objectives, evaluate=asked(root, **changes))
    with pytest.raises(UserError, match=message):
        live_of(made, alone())


def test_a_bank_that_cannot_name_a_class_is_warned_of(root: Path, caplog) -> None:
    one_class = [{"png": picture(i), "cls": b"0"} for i in range(4)]
    where = write_tar(root / "one/0.tar", one_class)
    with caplog.at_level(logging.WARNING):
        live_of(recipe(root, "few", evaluate=asked(root, train=str(where), tasks=["knn"])), alone())
    assert "k20: only 4 training images" in caplog.text
    assert "2 classes of" in caplog.text
