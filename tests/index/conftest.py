"""A trained-looking run, its shards and embeddings: tiny, real, made once a session."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from index.embed.job import Options, embed_shards
from index.store.build import build
from index.store.collection import Collection
from pretrain.checkpoint import CheckpointWriter, slice_for_rank
from pretrain.encoder import Encoder, load
from pretrain.models.trunk import build_trunk
from pretrain.recipe import ModelRecipe
from tests.tiny import VIT, add, picture, write_shards

HOSTILE = "<script>alert('x')</script> \x1b[31m red"


def save_run(folder: Path, seed: int, nan: bool = False) -> Path:
    """A run folder with one checkpoint of an untrained trunk."""
    model = ModelRecipe.model_validate(VIT)
    trunk = build_trunk(model, seed=seed)
    tensors = {f"model.{name}": t * float("nan") if nan else t for name, t in trunk.state_dict().items()}
    writer = CheckpointWriter(folder / "checkpoints", rank=0, world=1, attempt="a1")
    writer.save(1, slice_for_rank(tensors, 0, 1), {"recipe": {"model": model.model_dump(mode="json")}})
    writer.wait()
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "one", seed=0)


@pytest.fixture(scope="session")
def other_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "two", seed=1)


@pytest.fixture(scope="session")
def encoder(run: Path) -> Encoder:
    return load(run, device="cpu")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 good samples in 3 tars; in the last one also an unreadable image and a caption of an attacker."""
    folder = write_shards(tmp_path_factory.mktemp("shards"), samples=60, shards=3)
    with tarfile.open(folder / "00002.tar", "a") as tar:
        add(tar, "torn.jpg", b"\xff\xd8\xff not a picture")
        add(tar, "torn.txt", b"no picture")
        add(tar, "evil.png", picture(100))
        add(tar, "evil.txt", HOSTILE.encode())
    return folder


def tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


@pytest.fixture(scope="session")
def embeddings(encoder: Encoder, run: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embeddings")
    embed_shards(encoder, tars(shards), out, Options(batch=16, checkpoint=str(run)))
    return out


@pytest.fixture(scope="session")
def published(embeddings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection with one published version: for reading only."""
    collection = Collection(tmp_path_factory.mktemp("collections") / "read")
    build(collection, embeddings)
    collection.publish()
    return collection.folder


@pytest.fixture
def collection(published: Path, tmp_path: Path) -> Collection:
    """A copy of it to write to."""
    shutil.copytree(published, tmp_path / "collection")
    return Collection(tmp_path / "collection")
