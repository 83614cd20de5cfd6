"""Relations of classes from gates: the plain formulas on all pairs, the best pairs, the picture, the door."""

from __future__ import annotations

import base64
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from downstream import class_relations as relations
from downstream.__main__ import main
from downstream.heads import open_gates
from downstream.report.page import collect, page
from downstream.results import read, read_pictures
from downstream.weights import open_weights
from pretrain.errors import UserError
from pretrain.objectives.pieces.gates import Gates
from tests.downstream.hydra_run import CLASSES, write_hydra_run
from tests.downstream.scenes import write_run
from tests.downstream.test_report import HOSTILE, Sound


@pytest.fixture
def gates() -> Gates:
    torch.manual_seed(0)
    made = Gates(23, 6, 9, 8)
    torch.nn.init.normal_(made.filter[-1].weight, std=2)
    return made.eval()


def test_relations_are_cosines_of_centred_gates(gates: Gates) -> None:
    own = torch.cat([gates(torch.tensor([c]), torch.tensor([c])) for c in range(23)]).detach()
    centred = own - own.mean(0)
    wanted = {
        (a, b): float(F.cosine_similarity(centred[a], centred[b], 0)) for a, b in itertools.combinations(range(23), 2)
    }
    unit = relations.unit_gates(gates)
    best = sorted(wanted, key=wanted.get, reverse=True)[:10]
    found = relations.most_related(unit, 10)
    assert [(a, b) for a, b, _ in found] == best
    np.testing.assert_allclose([s for *_, s in found], [wanted[p] for p in best], atol=1e-5)
    assert relations.spread(unit) == pytest.approx(np.sqrt(np.mean(np.square(list(wanted.values())))), rel=1e-4)
    assert len(relations.most_related(unit, 10_000)) == 23 * 22 // 2


def test_openness_is_the_sum_of_each_pairs_gate(gates: Gates) -> None:
    pairs = list(itertools.combinations_with_replacement(range(23), 2))
    opened = {(a, b): float(gates.read(torch.tensor([a]), torch.tensor([b])).sum()) for a, b in pairs}
    apart = {p: s for p, s in opened.items() if p[0] != p[1]}
    figures, extremes = relations.openness(gates, 5)
    assert [p[:2] for p in extremes["open"]] == sorted(apart, key=apart.get, reverse=True)[:5]
    assert [p[:2] for p in extremes["closed"]] == sorted(apart, key=apart.get)[:5]
    assert extremes["closed"][0][2] == pytest.approx(min(apart.values()), rel=1e-5)
    assert figures["openness_pairs"] == pytest.approx(np.mean(list(apart.values())) / 8, rel=1e-5)
    assert figures["openness_own"] == pytest.approx(np.mean([opened[c, c] for c in range(23)]) / 8, rel=1e-5)
    assert 0 < figures["gate_entropy"] < np.log(2)


def test_pairs_are_streamed(gates: Gates, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = relations.openness(gates, 5), relations.most_related(relations.unit_gates(gates), 5)
    monkeypatch.setattr(relations, "ROWS", 3)
    stream, sizes = gates.pairs, []

    def small():
        for a, b, g in stream(block=11):
            sizes.append(len(a))
            yield a, b, g

    monkeypatch.setattr(gates, "pairs", small)
    (figures, extremes), related = relations.openness(gates, 5), relations.most_related(relations.unit_gates(gates), 5)
    assert max(sizes) == 11
    assert figures == pytest.approx(whole[0][0])
    for found, wanted in ((extremes["open"], whole[0][1]["open"]), (related, whole[1])):
        assert [p[:2] for p in found] == [p[:2] for p in wanted]


def test_a_large_matrix_is_the_mean_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = F.normalize(torch.randn(10, 4), dim=1)
    places = np.array([3, 1, 0, 2, 9, 8, 7, 6, 5, 4])
    small, one = relations.matrix(unit, places)
    assert one == 1
    np.testing.assert_allclose(small, (unit @ unit.T)[places][:, places], atol=1e-6)
    monkeypatch.setattr(relations, "MOST_CELLS", 4)
    large, three = relations.matrix(unit, places)
    assert (large.shape, three) == ((4, 4), 3)
    assert large[0, 1] == pytest.approx(small[0:3, 3:6].mean(), abs=1e-6)
    assert large[3, 2] == pytest.approx(small[9:10, 6:9].mean(), abs=1e-6)


def test_related_classes_stand_together() -> None:
    kinds = torch.arange(12) % 3
    unit = F.normalize(torch.eye(3)[kinds] + 0.05 * torch.randn(12, 3), dim=1)
    placed = kinds[relations.order(unit)].tolist()
    assert sum(a != b for a, b in itertools.pairwise(placed)) == 2


def test_colours_of_the_picture() -> None:
    uri = relations.as_png(np.array([[1.0, 0.0], [-1.0, 3.0]]))
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert pixels.tolist() == [[[36, 89, 201], [255, 255, 255]], [[195, 61, 53], [36, 89, 201]]]


def test_gates_that_do_not_depend_on_the_class_are_said(tmp_path: Path) -> None:
    write_hydra_run(tmp_path / "run")
    weights = open_weights(tmp_path / "run", untrained=False, device="cpu")
    same = open_gates(weights, tmp_path / "run")
    torch.nn.init.zeros_(same.embedding.weight)
    result = relations.evaluate_relations(weights, same, [], top=3).result
    assert result.metrics["relation_spread"] == 0
    assert any("does not depend on the class" in note for note in result.details["notes"])


def test_the_door_writes_pairs_and_a_page(tmp_path: Path, capsys) -> None:
    objective = write_hydra_run(tmp_path / "run")
    names = tmp_path / "names.txt"
    names.write_text("\n".join([HOSTILE.encode("utf-8", "replace").decode(), *"bcdefg"]))
    out = tmp_path / "out"
    argv = ["relations", str(tmp_path / "run"), "--out", str(out), "--top", "4", "--classnames", str(names)]
    assert main(argv) == 0
    assert "relation_spread" in capsys.readouterr().out
    (path,) = out.glob("*.json")
    result, shown = read(path), read_pictures(path)["relations"]
    assert (result.task, result.dataset) == ("class_relations", f"{CLASSES} classes")
    assert result.details["counts"] == {"classes": 7, "pairs": 28, "dimensions": 8}
    assert [len(shown[kind]) for kind in ("related", "open", "closed")] == [4, 4, 4]
    most = max(
        float(objective.gates.read(torch.tensor([a]), torch.tensor([b])).sum())
        for a, b in itertools.combinations(range(7), 2)
    )
    assert shown["open"][0][2] == pytest.approx(most, abs=1e-3)
    (drawn,) = out.glob("*.html")
    for text in (drawn.read_text(), page("tiny", {}, [], collect([out]))):
        sound = Sound(text)
        assert "Most alike" in sound.text
        assert [a["alt"] for tag, a in sound.tags if tag == "img"] == ["relations of all classes"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{root}/clip"], "only runs with objectives.hydra have gates; this one has clip"),
        (["{root}/open"], "gate: open"),
        (["{root}/open", "--top", "0"], "at least 1"),
    ],
)
def test_runs_without_gates_are_refused(tmp_path: Path, capsys, argv: list[str], message: str) -> None:
    write_run(tmp_path / "clip")
    write_hydra_run(tmp_path / "open", gate="open")
    assert main(["relations", *(a.format(root=tmp_path) for a in argv), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_the_untrained_control_has_the_first_gates(tmp_path: Path) -> None:
    write_hydra_run(tmp_path / "run")
    first = write_hydra_run(tmp_path / "first", seed=0)
    weights = open_weights(tmp_path / "run", untrained=True, device="cpu")
    assert torch.equal(open_gates(weights, tmp_path / "run").embedding.weight, first.gates.embedding.weight)
    with pytest.raises(UserError, match="no such folder"):
        open_gates(weights, tmp_path / "nowhere")
