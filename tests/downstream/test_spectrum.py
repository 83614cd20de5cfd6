"""The spectrum of features: known covariances, collapse, a run's own projector, the door."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream.__main__ import main
from downstream.heads import open_projector
from downstream.report import spectra
from downstream.report.page import collect, page
from downstream.results import read, read_pictures
from downstream.samples import Samples
from downstream.spectrum import evaluate_spectrum, spectrum
from downstream.weights import open_weights
from pretrain.errors import UserError
from tests.downstream.hydra_run import write_hydra_run
from tests.downstream.scenes import write_run, write_tar
from tests.downstream.test_report import Sound
from tests.ranks import run_ranks
from tests.tiny import picture, write_shards


def test_values_are_the_variances_of_the_axes() -> None:
    x = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3.0, 1.0, 0.1])
    found = spectrum(x + 7)  # a mean is no direction
    np.testing.assert_allclose(found.values, np.linalg.svd(np.cov(x.double().numpy(), rowvar=False))[1], rtol=1e-6)
    assert found.directions == 3  # 0.01 of 25 is below a thousandth
    even = spectrum(torch.cat([torch.eye(6), -torch.eye(6)]))
    assert even.directions == 6
    assert even.effective_rank == pytest.approx(6)
    assert even.rankme == pytest.approx(6, abs=1e-4)


def test_a_collapse_is_seen() -> None:
    line = torch.randn(100, 1) * torch.ones(1, 8) + 3
    found = spectrum(line)
    assert found.directions == 1
    assert found.effective_rank == pytest.approx(1)
    point = spectrum(torch.full((100, 8), 0.3))
    assert point.directions == 0
    assert point.effective_rank == 0


def test_one_row_has_no_spectrum() -> None:
    with pytest.raises(ValueError, match="two rows"):
        spectrum(torch.zeros(1, 4))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("spectrum")
    write_hydra_run(root / "run")
    write_hydra_run(root / "control", seed=2, gate="open")
    write_shards(root / "data", 70)
    return root


def test_encoder_and_projector_are_those_of_the_checkpoint(world: Path, tmp_path: Path) -> None:
    objective = write_hydra_run(tmp_path / "again")
    weights, samples = open_weights(world / "run", untrained=False, device="cpu"), Samples(str(world / "data"))
    name, projector = open_projector(weights, world / "run") or ("", None)
    assert name == "hydra"
    assert not projector.training
    images = torch.stack([weights.encoder.preprocess(samples.image(i)) for i in range(70)])
    pooled = weights.trunk.image(images, ("pooled",))["pooled"].detach()
    done = evaluate_spectrum(weights, (name, projector), samples)
    wanted = {"encoder": pooled, "projector": objective.eval().projector(pooled).detach()}
    for part, x in wanted.items():
        values = torch.linalg.eigvalsh(torch.cov(x.double().T)).flip(0)
        np.testing.assert_allclose(done.pictures["spectrum"][part], values / values[0], rtol=1e-3, atol=1e-6)
        assert done.result.metrics[f"{part}_rankme"] > 1
    assert done.result.details["counts"] == {"images": 70, "encoder dimensions": 16, "projector dimensions": 8}
    assert any("70 images for 16 dimensions" in note for note in done.result.details["notes"])


def on_ranks(rank: int, world_size: int, root: str) -> str:
    weights = open_weights(Path(root) / "run", untrained=False, device="cpu")
    done = evaluate_spectrum(weights, open_projector(weights, Path(root) / "run"), Samples(f"{root}/data"))
    return json.dumps([done.result.as_dict(), done.pictures]) if done else ""


def test_the_same_over_ranks(world: Path) -> None:
    assert run_ranks(on_ranks, 2, str(world)) == [on_ranks(0, 1, str(world)), ""]


def test_the_door_draws_runs_beside_each_other(world: Path, tmp_path: Path, capsys) -> None:
    argv = ["spectrum", str(world / "run"), str(world / "data"), "--control", str(world / "control")]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    assert "encoder_directions" in capsys.readouterr().out
    results = {path: read(path) for path in sorted(tmp_path.glob("*.json"))}
    assert [r.pretrained for r in results.values()] == ["tiny@step_00000003 of control", "tiny@step_00000003"]
    assert all(set(read_pictures(path)["spectrum"]) == {"encoder", "projector"} for path in results)
    (drawn,) = tmp_path.glob("*.html")
    sound = Sound(drawn.read_text())
    assert "Spectrum" in sound.text
    assert sum(tag == "path" for tag, _ in sound.tags) == 4  # two runs, two parts
    report = Sound(page("tiny", {}, [], collect([tmp_path])))
    assert "projector, RankMe" in report.text
    assert sum(tag == "path" for tag, _ in report.tags) == 4


def test_untrained_and_runs_without_a_projector(world: Path, tmp_path: Path) -> None:
    first = write_hydra_run(tmp_path / "first", seed=0)  # the recipe's own seed
    weights = open_weights(world / "run", untrained=True, device="cpu")
    _, projector = open_projector(weights, world / "run")
    assert torch.equal(projector[0].weight, first.projector[0].weight)
    clip = open_weights(write_run(tmp_path / "clip"), untrained=False, device="cpu")
    assert open_projector(clip, tmp_path / "clip") is None
    done = evaluate_spectrum(clip, None, Samples(str(world / "data")))
    assert set(done.pictures["spectrum"]) == {"encoder"}


def test_too_few_images_are_said(world: Path, tmp_path: Path) -> None:
    one = Samples(str(write_tar(tmp_path / "one/0.tar", [{"png": picture(0)}])))
    with pytest.raises(UserError, match="two images or more; 1 can be read"):
        evaluate_spectrum(open_weights(world / "run", untrained=False, device="cpu"), None, one)


def test_a_collapsed_spectrum_can_be_drawn() -> None:
    drawn = spectra.charts([("a <b>", "var(--own)", {"encoder": [1.0, 0.0, 0.0]}), ("c", "red", {"encoder": [0.0]})])
    assert Sound(drawn).text.count("Encoder") == 1
    assert "nan" not in drawn
    assert "<b>" not in drawn
    assert spectra.charts([]) == ""
