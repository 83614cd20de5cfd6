"""Evaluations end to end on a tiny real encoder: any number of ranks, damaged samples, doors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream.__main__ import main
from downstream.evaluate import evaluate_knn, evaluate_retrieval, evaluate_zeroshot
from downstream.features import encode_captions, encode_images, encode_texts
from downstream.results import read, read_pictures
from downstream.samples import Samples
from downstream.weights import open_weights
from pretrain.errors import UserError
from tests.downstream.scenes import write_run, write_tar
from tests.ranks import free_port, run_ranks
from tests.tiny import picture, write_shards


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and a data set of 150 training and 90 test images."""
    root = tmp_path_factory.mktemp("evaluate")
    write_run(root / "run")
    write_shards(root / "data/train", 150)
    write_shards(root / "data/test", 90)
    return root


def weights(root: Path, **kwargs):
    return open_weights(root / "run", **{"untrained": False, "device": "cpu"} | kwargs)


def figures_on(rank: int, world_size: int, root: str) -> dict:
    """All three evaluations; what the first rank found, and that the others hand over nothing."""
    encoder, train, test = weights(Path(root)), *(Samples(f"{root}/data/{s}") for s in ("train", "test"))
    done = [
        evaluate_retrieval(encoder, test),
        evaluate_knn(encoder, train, test),
        evaluate_zeroshot(encoder, test, ["zero", "one", "two"], ["a {c}.", "the {c}"]),
    ]
    assert [d is None for d in done] == [rank > 0] * 3
    images = encode_images(encoder, test, output="pooled")
    vectors = images.vectors.tobytes() + encode_captions(encoder, test).vectors.tobytes()
    files = {d.result.task: json.dumps([d.result.as_dict(), d.pictures]) for d in done if d}
    return {"vectors": vectors, "labels": images.labels.tolist(), "files": files}


@pytest.mark.parametrize("world_size", [2, 3])
def test_results_do_not_depend_on_the_number_of_ranks(world: Path, world_size: int) -> None:
    alone = figures_on(0, 1, str(world))
    first, *others = run_ranks(figures_on, world_size, str(world))
    assert len(alone["files"]) == 3
    assert first == alone  # figures, intervals, pictures and map, to the last character; vectors to the bit
    for other in others:  # with three ranks, 90 images are fewer batches than ranks
        assert other == alone | {"files": {}}


def test_vectors_are_those_of_the_encoder_alone(world: Path) -> None:
    encoder, test = weights(world), Samples(str(world / "data/test"))
    images = encode_images(encoder, test)
    expected = encoder.encoder.encode_image([test.image(i) for i in range(90)])
    np.testing.assert_allclose(images.vectors, expected, atol=1e-6)
    assert images.labels.tolist() == [i % 3 for i in range(90)]
    captions = encode_captions(encoder, test)
    assert captions.image.tolist() == [i // 2 for i in range(180)]
    np.testing.assert_allclose(captions.vectors, encoder.encoder.encode_text(captions.texts), atol=1e-6)


def test_equal_captions_have_equal_vectors_and_tie(world: Path) -> None:
    texts = ["a dog", *(f"another {i}, and a much longer one" for i in range(300)), "a dog"]
    vectors = encode_texts(weights(world), texts)
    assert np.array_equal(vectors[0], vectors[-1])


def damaged_set(root: Path) -> Samples:
    whole = [{"png": picture(i), "txt": f"thing {i}".encode(), "cls": str(i % 2).encode()} for i in range(6)]
    whole[1]["png"] = b"\x89PNG broken"
    del whole[2]["txt"]
    whole[3]["txt"] = b"\xff\xfe"
    del whole[4]["cls"]
    whole[5]["txt"] = b"one\n\ntwo\\nlines\n"
    return Samples(str(write_tar(root / "broken/0.tar", whole)))


def test_damaged_samples_are_left_out_counted_and_named(world: Path, tmp_path: Path) -> None:
    samples = damaged_set(tmp_path)
    assert samples.captions(5) == ["one", "two\nlines"]
    result = evaluate_retrieval(weights(world), samples).result
    assert result.details["counts"] == {"images": 5, "captions": 4}
    notes = " ".join(result.details["notes"])
    assert "1 images" in notes
    assert "k001" in notes
    assert "1 samples have captions that are not UTF-8" in notes
    assert "2 images have no caption" in notes
    result = evaluate_knn(weights(world), samples, samples).result
    assert result.details["counts"]["test images"] == 4
    assert "1 images of" in " ".join(result.details["notes"])


def test_a_damaged_image_has_weight_nought_and_moves_no_other_vector(world: Path, tmp_path: Path) -> None:
    images = encode_images(weights(world), damaged_set(tmp_path))
    assert images.whole.tolist() == [True, False, True, True, True, True]
    assert not images.vectors[1].any()
    expected = weights(world).encoder.encode_image([picture(5)])
    np.testing.assert_allclose(images.vectors[5:], expected, atol=1e-6)


def test_equal_images_rank_by_number(world: Path, tmp_path: Path) -> None:
    same = [{"png": picture(0), "txt": b"the same thing"}] * 10
    samples = Samples(str(write_tar(tmp_path / "same/0.tar", same)))
    metrics = evaluate_retrieval(weights(world), samples).result.metrics
    assert metrics["image_retrieval_recall@1"] == 0.1
    assert metrics["image_retrieval_recall@5"] == 0.5
    assert metrics["text_retrieval_median_rank"] == 5


def test_nothing_usable_is_said_clearly(world: Path, tmp_path: Path) -> None:
    no_text = Samples(str(write_tar(tmp_path / "a/0.tar", [{"png": picture(0)}])))
    no_image = Samples(str(write_tar(tmp_path / "b/0.tar", [{"txt": b"x"}])))
    bad_class = Samples(str(write_tar(tmp_path / "c/0.tar", [{"png": picture(0), "cls": b"dog"}])))
    huge_class = Samples(str(write_tar(tmp_path / "e/0.tar", [{"png": picture(0), "cls": b"999999999"}])))
    high_class = Samples(str(write_tar(tmp_path / "d/0.tar", [{"png": picture(0), "cls": b"7"}])))
    encoder = weights(world)
    with pytest.raises(UserError, match="has a caption"):
        evaluate_retrieval(encoder, no_text)
    with pytest.raises(UserError, match="has an image"):
        evaluate_retrieval(encoder, no_image)
    with pytest.raises(UserError, match="none can vote"):
        evaluate_knn(encoder, no_text, high_class)
    with pytest.raises(UserError, match=r"0\.tar: k000: its class is 'dog'"):
        evaluate_knn(encoder, bad_class, bad_class)
    with pytest.raises(UserError, match="not a number below 1,000,000"):
        evaluate_knn(encoder, huge_class, huge_class)
    with pytest.raises(UserError, match="k000 is of class 7, but there are 2 class names"):
        evaluate_zeroshot(encoder, high_class, ["a", "b"], ["{c}"])
    diverged = weights(world)
    torch.nn.init.constant_(diverged.trunk.image.projection.weight, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        evaluate_retrieval(diverged, Samples(str(world / "data/test")))
    image_only = write_run(tmp_path / "image-only", text=None)
    with pytest.raises(UserError, match="no text tower"):
        evaluate_retrieval(open_weights(image_only, untrained=False), Samples(str(world / "data/test")))


def test_untrained_is_the_run_before_its_first_step(world: Path) -> None:
    trained, untrained = weights(world), weights(world, untrained=True)
    assert (trained.name, untrained.name) == ("tiny@step_00000003", "untrained")
    assert trained.encoder.fingerprint != untrained.encoder.fingerprint
    seeded = write_run(world / "seed0", seed=0)  # the recipe's own seed: a run saved before any step
    assert open_weights(seeded, untrained=False).encoder.fingerprint == untrained.encoder.fingerprint
    assert weights(world, name="control").name == "control"


def test_doors_write_results_and_pictures(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data, out = str(world / "run"), str(world / "data"), str(world / "results")
    assert main(["retrieval", run, f"{data}/test", "--out", out]) == 0
    assert main(["retrieval", run, f"{data}/test", "--out", out, "--untrained"]) == 0
    assert main(["knn", run, "--train", f"{data}/train", "--test", f"{data}/test", "--out", out]) == 0
    assert main(["zeroshot", run, f"{data}/test", "--out", out]) == 0
    assert "image_retrieval_recall@1" in capsys.readouterr().out
    found = {path.stem: read(path) for path in Path(out).glob("*.json")}
    assert len(found) == 4
    knn = found["knn_data_tiny@step_00000003"]
    assert knn.dataset == "data"
    assert knn.details["features"] == "pooled"
    assert knn.details["role"] == "trained"
    assert set(knn.intervals) == {k for k, v in knn.metrics.items() if v is not None}
    pictures = read_pictures(Path(out) / "knn_data_tiny@step_00000003.json")
    assert len(pictures["neighbours"]) == 8
    assert pictures["confusion"]["classes"] == ["zero", "one", "two"]
    assert sum(map(sum, pictures["confusion"]["counts"])) == 90
    assert len(pictures["map"]["points"]) == 90


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["retrieval", "nowhere", "data"], "nowhere: no such folder"),
        (["retrieval", "{root}/data", "{root}/data/test"], "no whole checkpoint"),
        (["retrieval", "{root}/run", "{root}/none"], "no shard"),
        (["zeroshot", "{root}/run", "{root}/data/test", "--templates", "{root}/run/none.txt"], "none.txt"),
    ],
)
def test_doors_name_what_is_wrong(world: Path, capsys, argv: list[str], message: str) -> None:
    argv = [a.format(root=world) for a in argv]
    assert main([*argv, "--out", str(world / "unused")]) == 2
    assert message in capsys.readouterr().err
    assert not (world / "unused").exists()


def test_a_launcher_of_two_processes_gives_one_result(world: Path, tmp_path: Path) -> None:
    """What `torchrun` sets for each process, set by hand."""
    argv = ["retrieval", str(world / "run"), str(world / "data/test"), "--out"]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "downstream", *argv, str(tmp_path / "two")]
    ranks = [subprocess.Popen(command, env=common | {"RANK": r, "LOCAL_RANK": r}) for r in "01"]
    assert [r.wait(120) for r in ranks] == [0, 0]
    assert main([*argv, str(tmp_path / "one")]) == 0
    one, two = (next((tmp_path / n).glob("*.json")).read_text() for n in ("one", "two"))
    assert one == two


def test_help_answers_without_torch() -> None:
    code = "import sys, downstream.__main__ as m; m.main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert "retrieval" in done.stdout
