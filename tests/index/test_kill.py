"""Killed at every step: what was published stays served, what was embedded stays, nothing is half."""

from __future__ import annotations

import filecmp
import subprocess
import sys

from index.embed.job import Options, embed_shards
from index.store.build import build
from tests.index.conftest import tars


def job(*argv: object) -> int:
    done = subprocess.run([sys.executable, "-m", "tests.index.kill", *map(str, argv)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


def test_publish_killed_at_every_step(collection, embeddings):
    build(collection, embeddings, replace=True)
    assert job("publish", collection.folder) > 15


def test_build_killed_at_every_step(collection, embeddings):
    assert job("build", collection.folder, embeddings) > 15


def test_embedding_killed_again_and_again_gives_the_same(encoder, run, shards, embeddings, tmp_path):
    out = tmp_path / "embeddings"
    out.mkdir()
    assert job("embed", run, shards, out) >= 3
    units = sorted(p.name for p in (embeddings / "units").iterdir())
    assert sorted(p.name for p in (out / "units").iterdir() if not p.name.startswith(".")) == units
    for unit in units:
        names = [p.name for p in (embeddings / "units" / unit).iterdir()]
        _, differ, errors = filecmp.cmpfiles(embeddings / "units" / unit, out / "units" / unit, names, False)
        assert not differ
        assert not errors
    counts = embed_shards(encoder, tars(shards), out, Options(batch=16, checkpoint=str(run)))
    assert counts.known == 3
    assert counts.rows + counts.skipped.total() == counts.members == 62
