"""What the documents show works as written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

import polyview
from pretrain.__main__ import main
from pretrain.recipe import parse_recipe
from tests.tiny import recipe_data, write_recipe, write_shards

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def test_the_objective_of_the_guide_trains_beside_clip(tmp_path, monkeypatch):
    (code,) = blocks(ROOT / "docs" / "OBJECTIVES.md", "python")
    (tmp_path / "my_project").mkdir()
    (tmp_path / "my_project" / "align.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    data = recipe_data(write_shards(tmp_path / "shards"), tmp_path / "run", steps=2)
    data["objectives"] = {"clip": 1.0, "my_project.align": 0.1}
    assert main([str(write_recipe(tmp_path / "r.yaml", data))]) == 0


def test_the_recipe_of_the_readme_is_valid():
    text = "".join(blocks(ROOT / "README.md", "yaml"))
    assert parse_recipe(yaml.safe_load(text), "README").total_steps(100_000) == 782


@pytest.mark.parametrize("page", DOCS, ids=lambda p: p.name)
def test_every_command_names_a_door_and_flags_that_exist(page):
    import argparse
    import importlib

    verbs = polyview.verbs()
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] != ["python", "-m"] or words[2] not in ("pretrain", "index", "downstream", "slurm"):
            continue
        verb = words[3] if words[3] in verbs else "train"
        parser = argparse.ArgumentParser()
        importlib.import_module(verbs[verb]).add_arguments(parser)
        parser.parse_intermixed_args(words[4:] if words[3] in verbs else words[3:])


@pytest.mark.parametrize("page", DOCS, ids=lambda p: p.name)
def test_every_file_a_document_links_to_is_there(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
