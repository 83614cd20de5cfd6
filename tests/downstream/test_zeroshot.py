"""Zero-shot classification: open_clip's formula, stated ties, templates checked before encoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from downstream import zeroshot
from downstream.classification import metrics
from downstream.features import encode_images, encode_texts
from downstream.samples import Samples
from downstream.weights import open_weights
from pretrain.errors import UserError
from tests.downstream.scenes import write_run
from tests.tiny import write_shards

NAMES = ["zero", "one", "two"]
TEMPLATES = ["a photo of a {c}.", "a drawing of the {c}.", "{c}"]


def test_figures_are_those_of_open_clips_formula(tmp_path: Path) -> None:
    weights = open_weights(write_run(tmp_path / "run"), untrained=False, device="cpu")
    samples = Samples(str(write_shards(tmp_path / "data", 50)))
    images = encode_images(weights, samples)
    prompts = encode_texts(weights, zeroshot.prompts(NAMES, TEMPLATES))
    found = zeroshot.classify(images.vectors, zeroshot.classifier(prompts, 3), images.labels)

    # open_clip's build_zero_shot_classifier and CLIP_benchmark's accuracy, written out
    columns = []
    for name in NAMES:
        texts = [template.format(c=name) for template in TEMPLATES]
        embedded = F.normalize(torch.from_numpy(weights.encoder.encode_text(texts)), dim=-1)
        mean = embedded.mean(dim=0)
        columns.append(mean / mean.norm())
    features = torch.from_numpy(weights.encoder.encode_image([samples.image(i) for i in range(50)]))
    ours = zeroshot.classifier(prompts, 3)
    np.testing.assert_allclose(ours, torch.stack(columns).numpy(), atol=1e-6)
    logits = 100.0 * features @ torch.stack(columns, dim=1)
    right = torch.from_numpy(images.labels)
    assert np.array_equal(found.predicted, logits.argmax(1).numpy())
    assert metrics(found)["acc1"] == pytest.approx((logits.argmax(1) == right).float().mean().item())
    assert len(set(found.ranks.tolist())) > 1


def test_of_equal_names_the_first_is_the_answer() -> None:
    images = np.eye(2, dtype=np.float32)
    names = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    found = zeroshot.classify(images, names, np.array([1, 2]))
    assert found.predicted.tolist() == [0, 2]
    assert found.ranks.tolist() == [2, 1]


def test_five_best_need_five_classes() -> None:
    vectors = np.eye(6, dtype=np.float32)
    assert metrics(zeroshot.classify(vectors, vectors, np.arange(6)))["acc5"] == 1.0
    assert metrics(zeroshot.classify(vectors[:4], vectors[:4], np.arange(4)))["acc5"] is None


@pytest.mark.parametrize("template", ["a photo", "{}", "{c} {d}", "{c", "a {c!x}"])
def test_a_template_that_does_not_fit_is_named(template: str) -> None:
    with pytest.raises(UserError, match=r"t\.txt, line 2"):
        zeroshot.check_templates(["a {c}", template], "t.txt")


def test_class_names_may_hold_anything() -> None:
    assert zeroshot.prompts(["{c} & {x}"], ["a {c}."]) == ["a {c} & {x}."]


def test_files_of_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\r\ntwo \n\n", "utf-8")
    assert zeroshot.read_lines(tmp_path / "a.txt") == ["one", "two"]
    (tmp_path / "b.txt").write_text("\n")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "d.txt").write_text("one\n\ntwo\n")  # would move every class after it
    for name in ("b.txt", "c.txt", "d.txt", "none.txt"):
        with pytest.raises(UserError, match=name):
            zeroshot.read_lines(tmp_path / name)
