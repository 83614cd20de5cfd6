"""Kills at a chosen step, for real: a forked child leaves by os._exit at its n-th touch of a watched folder.

Python announces every open, rename, mkdir, remove and flock to audit hooks before it happens; nothing is
replaced. Run as a script in a process of its own: `python -m tests.index.kill JOB FOLDER …`, see the jobs
below.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

WATCHED = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.listdir",
    "os.scandir",
    "fcntl.flock",
}
KILLED = 77


def arm(folder: Path, step: int) -> None:
    """From here on, end this process at its `step`-th touch of `folder`."""
    left = step
    prefix = str(folder)

    def hook(event: str, args: tuple) -> None:
        nonlocal left
        if event in WATCHED and (event == "fcntl.flock" or any(str(a).startswith(prefix) for a in args)):
            left -= 1
            if left == 0:
                os._exit(KILLED)

    sys.addaudithook(hook)


def killed_at(step: int, folder: Path, job: Callable[[], object]) -> bool:
    """Whether the job died at that step, rather than having finished before it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            arm(folder, step)
            job()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), f"step {step}: exit code {code}"
    return code == KILLED


def publish_at_every_step(folder: Path) -> int:
    """Version 2 is published over version 1 with a kill at each step; readers find one of the two, whole."""
    from index.store.collection import Collection

    collection = Collection(folder)
    step = swapped = 0
    while True:
        step += 1
        collection.publish("000001")
        killed = killed_at(step, folder, lambda: collection.publish("000002"))
        manifest, segments = collection.open()
        assert manifest.version in ("000001", "000002")
        assert sum(map(len, (s.emb for s in segments))) == manifest.rows
        swapped += killed and manifest.version == "000002"
        if not killed:
            assert manifest.version == "000002"
            assert swapped, "no kill came after the swap"
            return step


def build_at_every_step(folder: Path, embeddings: Path) -> int:
    """Builds that die at each step leave the published version as it is; one that is left alone succeeds."""
    from index.store.build import build
    from index.store.collection import Collection

    collection = Collection(folder)
    before = collection.open()[0]
    step = 0
    while killed_at(step := step + 1, folder, lambda: build(collection, embeddings, replace=True)):
        assert collection.open()[0] == before
        for version in collection.versions():
            collection.open(version)
    collection.publish()
    assert collection.open()[0].rows == before.rows
    return step


def embed_with_kills(run: Path, shards: Path, out: Path) -> int:
    """Embedding dies at every fifth step of those left, and is started again until it is done."""
    import torch

    from index.embed.job import Options, embed_shards
    from pretrain.encoder import load

    torch.set_num_threads(1)
    encoder = load(run, device="cpu")
    kills = 0
    tars = sorted(shards.glob("*.tar"))
    step = 5
    while killed_at(step, out, lambda: embed_shards(encoder, tars, out, Options(batch=16, checkpoint=str(run)))):
        kills += 1
        step += 5
    return kills


if __name__ == "__main__":
    jobs = {"publish": publish_at_every_step, "build": build_at_every_step, "embed": embed_with_kills}
    print(jobs[sys.argv[1]](*map(Path, sys.argv[2:])))
